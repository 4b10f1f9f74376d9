"""Standard streams that report a lost result: stdout and stderr that are closed, full or not UTF-8.

- If the reader of a pipe has exited (`| head -1`), or a stream is closed (`>&-`), the output is dropped.
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

from inferctl.core.errors import NotReadyError

_READER_GONE = (errno.EPIPE, errno.ECONNRESET)
# Replacements for the symbols of tables and progress lines in encodings without them.
_ASCII = {
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
    """A file descriptor for output. After a failed write, it drops all further output. `lost`: whether it dropped any.

    `closed_at_start`: then the descriptor is /dev/null.
    """

    def __init__(self, number: int, closed_at_start: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self.lost, self._failed = closed_at_start, False

    def write(self, data: object) -> int:
        """Write a part of `data` and return its length. Raises `NotReadyError` if stdout cannot be written."""
        view = memoryview(data)  # type: ignore[arg-type]  # any buffer
        while not self._failed:
            try:
                written = super().write(view)
            except OSError as error:
                self.lost = self._failed = True
                if self.fileno() == 1 and error.errno not in _READER_GONE:
                    reason = (error.strerror or str(error)).lower()
                    raise NotReadyError(
                        f"cannot write to stdout: {reason}", "free some space, or redirect stdout to another file"
                    ) from None
            else:
                if written is not None:
                    return written
                # Another process has set the terminal or the pipe to non-blocking mode.
                select.select([], [self.fileno()], [])
        return view.nbytes


def guard() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that follow the rules above; open closed ones on /dev/null."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        # Otherwise the first file that a child process opens becomes its stdout.
        os.set_inheritable(number, True)
    os.close(number)
    codecs.register_error(_ERRORS, _plain)
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def stdout_is_lost() -> bool:
    """Return whether output to stdout was dropped, because it is closed or its reader has exited."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Descriptor) and raw.lost


def _guarded(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, stream is None)),
        encoding=stream.encoding if stream else "utf-8",
        errors=_ERRORS,
        line_buffering=stream.line_buffering if stream else False,
        write_through=stream.write_through if stream else False,
    )


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the encoding lacks. Bytes of a file name that are not UTF-8 do not change."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode(), error.start + 1
