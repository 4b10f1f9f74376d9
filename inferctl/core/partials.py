"""The only way to write files and folders that get their name when they are complete, or that are temporary.

In a shared folder, others can make a name before inferctl does, so each partial name is random and must be new.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# A process locks its folder within this time.
_NEW_S = 60.0


def new_file(path: Path, mode: int = 0o666) -> BinaryIO:
    """Create and open `path` for writing. Raises `FileExistsError`, also for a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, mode), "wb")


@contextmanager
def partial_file(target: Path, mode: int = 0o666) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file next to `target`, open for writing. It is removed at the end, unless it was renamed."""
    partial = next_to(target)
    with new_file(partial, mode) as to:
        try:
            yield partial, to
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def synced_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a new file. If the body ends without an exception, it and its name `target` are on the disk."""
    with partial_file(target) as (partial, to):
        yield to
        to.flush()
        os.fsync(to.fileno())
        partial.replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def partial_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder next to `target`, and remove it at the end, unless it was renamed.

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
    partial = next_to(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode)
    lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _lock(lock)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def complete(partial: Path, target: Path) -> bool:
    """Rename a partial folder to `target`, which may be an empty folder. Raises `OSError`.

    Return False if another process of this user has completed `target`. What others made is not used.
    """
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or target.lstat().st_uid != os.geteuid():
            raise
        return False
    return True


def next_to(target: Path) -> Path:
    """Return a name for the partial file or folder of `target` that nobody can guess."""
    # Without the process id: processes of two containers may have the same one.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")


def _lock(folder: int) -> bool:
    """Lock an open folder. Return whether it had no lock: False also on file systems without locks of folders."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
