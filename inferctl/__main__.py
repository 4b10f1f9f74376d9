"""The entry point of `inferctl` and of `python -m inferctl`."""

# What `signal` wraps: to import that takes milliseconds, in which Ctrl-C prints a traceback.
import _signal


def main() -> None:
    """Run the command line. A signal that arrives during its imports takes effect after them, without a traceback."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT, _signal.SIGTERM})
    from inferctl import cli

    cli.main()


if __name__ == "__main__":
    main()
