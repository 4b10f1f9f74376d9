"""`python -m inferctl` is the `inferctl` command."""

from inferctl.cli import main

if __name__ == "__main__":
    main()
