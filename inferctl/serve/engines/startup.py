"""Prepares a process before it imports transformers."""

import sys


def hide_scikit_learn() -> None:
    """Make Python find no scikit-learn in this process.

    transformers imports it if it is installed, for methods that no engine uses. That takes a second.
    """
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
