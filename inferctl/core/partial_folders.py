"""Folders for incomplete and temporary files. The next process removes what a killed one left."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A process locks its folder within this time.
_NEW_S = 60.0


@contextmanager
def partial_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """Make a new folder next to `target`, and remove it at the end, unless it was renamed.

    Also removes the folders for `target` of processes that were killed: those have no lock.
    """
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):
            # In /tmp, others can make such names: a pipe would block this process, and root can remove their folders.
            lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            found = os.fstat(lock)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _NEW_S and _lock(lock):
                shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    # Processes of two containers may have the same id.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _lock(folder: int) -> bool:
    """Lock an open folder. Return whether it had no lock: False also on file systems without locks of folders."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
