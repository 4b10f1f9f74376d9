"""The entry point of `inferctl` and of `python -m inferctl`."""

import signal


def main() -> None:
    """Run the command line. A signal that arrives during its imports takes effect after them, without a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    from inferctl import cli

    cli.main()


if __name__ == "__main__":
    main()
