"""Entry point of `python -m inferctl.serve`, which the image starts."""

import os
import signal
import sys

if __name__ == "__main__":
    # Until the server has its own handlers. Imports can drop the exception of a handler, and the kernel drops a SIGTERM
    # for the first process of a container that has no handler. 130 is `EXIT_INTERRUPTED`, which needs an import.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))

    from inferctl.serve.main import exit_with, main

    exit_with(lambda: main(sys.argv[1:]))
