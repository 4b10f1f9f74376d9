"""Standard streams of each program: what terminals would obey is escaped, and a lost result is reported.

Names in model files, responses of servers and log lines are written by others. So every text is escaped here, also that
of a traceback or of a library. Only what inferctl makes itself, such as colors, is written with `raw`.

- If the reader of a pipe has exited (`| head -1`), or a stream is closed (`>&-`), the output is dropped.
  The command keeps its exit code.
- If stdout cannot be written for another reason, such as a full disk, the command fails with exit code 3.
- If stderr cannot be written, the output is dropped: nothing on stderr is part of a result.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import select
import sys
from typing import Any, TextIO, cast

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
# Terminals obey these (ECMA-48), or write what follows in another order. A lone carriage return overwrites its line.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)")


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


class _Stream(io.TextIOWrapper):
    def write(self, text: str) -> int:
        return super().write(printable(text))


class _Raw:
    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: str) -> str:
    """Return `text` with escapes as in JSON in place of control characters, except line breaks and tabs."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def raw(stream: TextIO) -> TextIO:
    """Return `stream` without escapes, for texts in which all that others wrote is escaped."""
    return cast(TextIO, _Raw(stream)) if isinstance(stream, _Stream) else stream


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
    return _Stream(
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
