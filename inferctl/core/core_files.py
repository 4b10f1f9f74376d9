"""Core files: the memory of a process that crashed, written by the kernel. Here it has texts, API keys and tokens."""

from __future__ import annotations

import contextlib
import resource


def disable() -> None:
    """Let the kernel write no core file of this process and of those that it starts, whatever the limit was.

    A limit of 0 would not do: the kernel ignores it if `core_pattern` is a program, such as that of systemd or Ubuntu.
    For both kinds, 1 byte means no core file.
    """
    with contextlib.suppress(ValueError, OSError):  # the hard limit is 0, and this is not root
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
