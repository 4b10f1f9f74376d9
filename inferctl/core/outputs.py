"""Files that a command writes: checked before the work that fills them, and written after it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from inferctl.core.errors import NotReadyError, UsageError
from inferctl.core.partials import new_file, next_to, partial_file


def check(file: Path, option: str, *, parents: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise `UsageError` if `file`, which `option` names, cannot be written later.

    An existing file must be a regular file and must not be an input of the command.

    `parents`: whether `write` creates missing folders. `inputs`: files that the command reads, and folders from which
    it may read any file.
    """
    place = "another file" if parents else "another file, in a folder that exists and is writable,"
    hint = f"name {place} with `{option}`"
    try:
        if file.is_dir():
            raise UsageError(f"{file} cannot be written: it is a folder", hint)
        if not file.exists():
            _probe(file.parent, parents)
        elif not file.is_file():
            raise UsageError(f"{file} cannot be written: it is not a regular file", hint)
        elif any(_is_input(file, path) for path in inputs):
            raise UsageError(f"{file} cannot be written: it is an input of this command", hint)
        elif not os.access(file, os.W_OK):
            raise PermissionError(0, "permission denied")
        else:
            file.open("ab").close()
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {_reason(error)}", hint) from None


def check_folder(folder: Path, option: str) -> None:
    """Raise `UsageError` if no file can be written into `folder`. The folder may be missing."""
    try:
        _probe(folder, parents=True)
    except OSError as error:
        what = f"{folder} cannot be written: {_reason(error)}"
        raise UsageError(what, f"name another folder with `{option}`") from None


def write(file: Path, content: str | bytes, option: str) -> None:
    """Write text (as UTF-8) or bytes, and create missing folders. Raises `NotReadyError`; then no new file stays."""
    new = not os.path.lexists(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        if new:
            with contextlib.suppress(OSError):
                file.unlink()
        what = f"{file} cannot be written: {_reason(error)}"
        raise NotReadyError(what, f"name another place with `{option}`") from None


def write_all(folder: Path, files: Mapping[str, bytes], option: str) -> None:
    """Write `files` (name -> content) below `folder`, and create folders as needed. Raises `NotReadyError`."""
    for name, content in files.items():
        write(folder / name, content, option)


def replace(
    file: Path, text: str, mode: int = 0o666, before: Callable[[], None] = lambda: None, *, sync: bool = True
) -> None:
    """Replace `file` atomically: a reader sees the old content or all of `text`. Raises `OSError`.

    An existing file keeps its permissions; a new one gets `mode`, reduced by the umask. `before` is called when all of
    `text` is on disk; if it raises, `file` does not change. `sync`: False if `file` may be empty after a power failure.
    """
    with partial_file(file, mode) as (partial, to):
        _write_synced(to, text, sync)
        if file.exists():
            shutil.copymode(file, partial)
        before()
        partial.replace(file)


@contextlib.contextmanager
def secret(file: Path, text: str, option: str, *, force: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """Write `text` for its owner alone, run the body, which makes it valid, and move it to `file`.

    If the body raises, `file` is what it was. `force`: replace an existing file. `inputs`: see `check`. Raises
    `UsageError` and `NotReadyError`.
    """
    check(file, option, inputs=inputs)
    file = file.resolve()  # a link stays a link
    place = next_to(file) if force else file
    try:
        with new_file(place, 0o600) as to:
            _write_synced(to, text)
    except FileExistsError:
        hint = f"pass `--force` to replace it, or name another file with `{option}`"
        raise UsageError(f"{file} already exists", hint) from None
    try:
        yield
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    if force:
        try:
            place.replace(file)
        except OSError as error:
            message = f"{file} cannot be replaced: {_reason(error)}; its new content is in {place}"
            raise NotReadyError(message, "move that file yourself") from None


def retract(file: Path) -> None:
    """Remove the announcement file of an earlier server.

    Raises `UsageError` if `file` is not an announcement or is not writable.
    """
    check(file, "--announce")
    hint = "name a new file with `--announce`"
    # `replace` would replace the link, not the file that it points to.
    if file.is_symlink():
        raise UsageError(f"{file} cannot be written: it is not a regular file", hint)
    # An empty file is allowed: scripts create one with `mktemp` and wait for content.
    if file.exists() and file.stat().st_size and not _is_announcement(file):
        raise UsageError(f"{file} cannot be written: it exists, and no server wrote it", hint)
    file.unlink(missing_ok=True)


def announce(file: Path, url: str) -> None:
    """Write to `file` that a server is ready at `url`, for scripts that wait for it. Raises `NotReadyError`."""
    try:
        replace(file, json.dumps({"url": url, "pid": os.getpid()}))
    except OSError as error:
        what = f"{file} cannot be written: {_reason(error)}"
        raise NotReadyError(what, "name another file with `--announce`") from None


def _is_input(file: Path, path: Path) -> bool:
    """Return whether the existing `file` is the same file as `path`, or is inside the folder `path`."""
    if path.is_dir():
        return file.resolve().is_relative_to(path.resolve())
    return path.exists() and file.samefile(path)


def _is_announcement(file: Path) -> bool:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == {"url", "pid"}


def _probe(folder: Path, parents: bool) -> None:
    """Create and remove a file in `folder`, or with `parents` in its closest existing parent. Raises `OSError`."""
    while parents and not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    with partial_file(folder / "inferctl"):
        pass


def _write_synced(to: BinaryIO, text: str, sync: bool = True) -> None:
    to.write(text.encode())
    to.flush()
    if sync:
        os.fsync(to.fileno())  # otherwise a power failure can leave an empty file


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
