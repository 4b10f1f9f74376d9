"""Entry point of `python -m inferctl.serve`, which the image starts."""

import sys

from inferctl.serve.main import exit_with, main

if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
