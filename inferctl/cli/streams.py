"""Standard streams that cannot fake a result: what happens if stdout or stderr is closed, full, or not UTF-8.

- If the reader of a pipe is gone (`| head -1`), or a stream is closed (`>&-`), the output is dropped.
  The command keeps its exit code.
- If stdout cannot be written for another reason, such as a full disk, the command fails with exit code 3.
- If stderr cannot be written, the output is dropped: nothing on stderr is part of a result.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import TextIO

from inferctl.errors import NotReadyError

_READER_GONE = (errno.EPIPE, errno.ECONNRESET)
# What tables and progress lines print, for encodings that do not have it.
_PLAIN = {
    "✓": "+",
    "✗": "x",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "·": "-",
    "±": "+/-",
    "…": "...",
    "–": "-",
    "—": "-",
    "×": "x",
    "µ": "u",
    "²": "^2",
}
_ERRORS = "inferctl.plain"


class _Descriptor(io.FileIO):
    """A file descriptor for output. Once a write has failed, it accepts and drops everything."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self._failed = False

    def write(self, data: object) -> int:
        """Write a part of `data` and return its length. Raises `NotReadyError` if stdout cannot be written."""
        view = memoryview(data)  # type: ignore[arg-type]  # whatever the buffer above passes
        while not self._failed:
            try:
                written = super().write(view)
            except OSError as error:
                self._failed = True
                if self.fileno() == 1 and error.errno not in _READER_GONE:
                    reason = (error.strerror or str(error)).lower()
                    raise NotReadyError(
                        f"stdout cannot be written: {reason}", "free space there, or redirect stdout to another file"
                    ) from None
            else:
                if written is not None:
                    return written
                # Another process has made the terminal or the pipe non-blocking.
                select.select([], [self.fileno()], [])
        return view.nbytes


def guard() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that follow the rules above; open closed ones on /dev/null."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        # Children would otherwise get their first file as stdout.
        os.set_inheritable(number, True)
    os.close(number)
    codecs.register_error(_ERRORS, _plain)
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number)),
        encoding=stream.encoding if stream else "utf-8",
        errors=_ERRORS,
        line_buffering=stream.line_buffering if stream else False,
        write_through=stream.write_through if stream else False,
    )


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding does not have; bytes of a file name that are not UTF-8 stay as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode(), error.start + 1
