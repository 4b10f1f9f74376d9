"""Reads JSON lines, CSV and Parquet in ranges of rows: divides a file once, and reads a range of it any time later.

Others made these files, so nothing in them decides how much memory a range takes: a record has a most size.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import orjson

from inferctl.core.errors import UsageError, did_you_mean, needs_packages, shown
from inferctl.embed.computer import Input

_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"PK\x03\x04")
MAX_RECORD_BYTES = 16 * 2**20
_SAMPLE_ROWS = 1000  # that decide of which type ids are
_CHUNK = 2**20
_READ_AGAIN = 7  # as a power of two: how often an open quote may let bytes be read again
# Rows of Parquet that are read at a time, and the bytes of a range, relative to those that the file states.
_BATCH_ROWS, _MOST_EXPANSION, _LEAST_EXPANDED = 512, 64, 256 * 2**20
_ROWS_PER_BYTE = 1000  # of a file of Parquet: a dictionary can state any number of equal rows in a few bytes


class Range(NamedTuple):
    """Consecutive rows of one input: its number, where they begin and end, their number, the first row and line.

    They begin and end at bytes, in Parquet at rows. Rows count from 0 over all inputs, lines from 1 in each.
    """

    file: int
    start: int
    stop: int
    rows: int
    first: int
    line: int


class Columns(NamedTuple):
    """The columns with the text, or with both texts of a pair, and with the id; without one, rows are numbered."""

    texts: tuple[str, ...]
    id: str | None
    whole: bool = True  # the ids are whole numbers, else texts

    @property
    def names(self) -> tuple[str, ...]:
        return self.texts if self.id is None else (*self.texts, self.id)


class Problem(NamedTuple):
    """Why a row is not computed. `id`: None if it has no usable one."""

    code: str
    message: str
    line: int = 0
    id: int | str | None = None


class Rows(NamedTuple):
    """The rows of a range: ids, lines and inputs of those that can be computed, and why others cannot."""

    ids: list[Any]
    lines: list[int]
    inputs: list[Input]
    problems: list[Problem]


# The values of the columns, where the record ends, and the lines from where the reading began up to there. An empty
# record is a blank line.
Record: TypeAlias = tuple[Sequence[Any] | Problem, int, int]
_TOO_LARGE = Problem("record_too_large", f"the record has more than {MAX_RECORD_BYTES:,} bytes")
_NOT_UTF8 = Problem("not_utf8", "the record is not UTF-8")


class JsonLines:
    """JSON objects, one on each line. `names`: keys of the first ones. `start`, `line`, `stop`: of the records."""

    names: Sequence[str]
    start, line = 0, 1

    def __init__(self, path: Path) -> None:
        self.path, self.stop = path, path.stat().st_size
        with path.open("rb") as stream:  # one at a time: a record of 16 MiB can take 400 MiB of objects
            found = (_object(line) for line, _ in islice(_lines(stream, 0, self.stop), 100))
            self.names = list(dict.fromkeys(name for each in found if isinstance(each, dict) for name in each))

    def records(self, start: int, stop: int, wanted: Sequence[str] | None) -> Iterator[Record]:
        """Yield the records between two places, with the values of some columns; None only counts them."""
        with self.path.open("rb") as stream:
            for count, (line, end) in enumerate(_lines(stream, start, stop), 1):
                found = {} if wanted is None else _object(line)
                values = [found.get(name) for name in wanted or ()] if isinstance(found, dict) else found
                yield values or (), end, count

    def divide(self, number: int, first: int, most_rows: int, most_bytes: int) -> Iterator[Range]:
        """Yield all ranges of the file. Each has at most so many rows, and so many bytes or one record."""
        start, rows, line, end, following = self.start, 0, self.line, self.start, self.line
        for _, stop, lines in self.records(self.start, self.stop, None):
            if rows == most_rows or (rows and stop - start > most_bytes):
                yield Range(number, start, end, rows, first, line)
                start, rows, first, line = end, 0, first + rows, following
            end, rows, following = stop, rows + 1, self.line + lines
        if rows:
            yield Range(number, start, end, rows, first, line)


class Csv(JsonLines):
    """Comma-separated values with a header, as Python's csv reads them: fields in quotes can have line breaks."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.stop = path, path.stat().st_size
        csv.field_size_limit(MAX_RECORD_BYTES)  # the default is 128 kB
        first = "\t" if path.suffix == ".tsv" else ","
        for self._delimiter in (first, ";", "\t", "|", first):
            header, self.start, lines = next(self._fields(0, self.stop), ([], 0, 0))
            self.names = [] if isinstance(header, Problem) else [str(_text(name)) for name in header]
            self.names[:1] = [name.removeprefix("\ufeff") for name in self.names[:1]]
            self.line = 1 + lines
            if column in self.names:
                break

    def records(self, start: int, stop: int, wanted: Sequence[str] | None) -> Iterator[Record]:
        for fields, end, lines in self._fields(start, stop):
            values: Sequence[Any] | Problem = fields
            if wanted is not None and fields and not isinstance(fields, Problem):
                named = dict(zip(self.names, fields, strict=False))
                values = _checked([_text(named[name]) if name in named else None for name in wanted])
            yield values, end, lines

    def _fields(self, start: int, stop: int) -> Iterator[tuple[list[str] | Problem, int, int]]:
        """Yield the fields of each record as Latin-1, so that one that is not UTF-8 ends where it should."""
        size = count = 0
        ends: list[tuple[int, int]] = []  # of lines of a record: the first one after each power of two bytes

        def lines(stream: BinaryIO) -> Iterator[str]:
            nonlocal start, size, count
            for line, end in _lines(stream, start, self.stop):
                start, count, size = end, count + 1, size + len(line)
                while size >> len(ends):
                    ends.append((start, count))
                if size > MAX_RECORD_BYTES:
                    raise csv.Error("it has no end")
                yield line.decode("latin-1")

        with self.path.open("rb") as stream:
            while start < stop:
                size = 0
                ends.clear()
                try:
                    for fields in csv.reader(lines(stream), delimiter=self._delimiter, strict=True):
                        yield fields, start, count
                        if start >= stop:
                            return
                        size = 0
                        ends.clear()
                except csv.Error as error:
                    # It ends with its first line, else an open quote would hide what follows. After a long search for
                    # its end, it has the first lines of that too, else a file takes the square of its size.
                    _, first = ends[0]
                    start, count = ends[max(0, len(ends) - _READ_AGAIN)]
                    hidden = f", so {count - first:,} more lines are left out" if count > first else ""
                    found = Problem("not_csv", f"the record is not CSV: {error}{hidden}")
                    yield _TOO_LARGE if size > MAX_RECORD_BYTES and not hidden else found, start, count


class Parquet(JsonLines):
    """Parquet with columns of strings. Its places are rows, which share the bytes that the file states evenly."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        with needs_packages("reading Parquet", "embed"):
            import pyarrow.parquet
            from pyarrow import types
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, meta = file.schema_arrow, file.metadata
                kinds = {name: schema.field(name).type for name in {*wanted} & {*schema.names}}
                groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        except (pyarrow.ArrowException, OSError, KeyError) as error:  # KeyError: two columns have the name
            raise UsageError(f"{path} cannot be read as Parquet: {shown(str(error))}", "write the file again") from None
        self.path, self.stop, self.names = path, meta.num_rows, schema.names
        if self.stop > _ROWS_PER_BYTE * path.stat().st_size:
            problem = f"{path} states {self.stop:,} rows, over {_ROWS_PER_BYTE:,} for each of its bytes"
            raise UsageError(problem, "write the file again")
        for name, kind in kinds.items():
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
                raise UsageError(f"the column {name!r} of {path} has the type {kind}", "name a column of strings")
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        self._bytes = sum(each.total_uncompressed_size for each in columns if each.path_in_schema in wanted)
        self._groups = [group.num_rows for group in groups]

    def divide(self, number: int, first: int, most_rows: int, most_bytes: int) -> Iterator[Range]:
        most = max(1, min(most_rows, self.stop * most_bytes // max(1, self._bytes)))
        for start in range(0, self.stop, most):
            stop = min(start + most, self.stop)
            yield Range(number, start, stop, stop - start, first + start, start + 1)

    def records(self, start: int, stop: int, wanted: Sequence[str] | None) -> Iterator[Record]:
        import pyarrow

        try:
            yield from self._records(start, stop, wanted)
        except (pyarrow.ArrowException, OSError) as error:
            problem = f"{self.path} has damaged rows from {start:,} to {stop:,}: {shown(str(error))}"
            raise UsageError(problem, "write the file again") from None

    def _records(self, start: int, stop: int, wanted: Sequence[str] | None) -> Iterator[Record]:
        import pyarrow.parquet

        group, skip, size, row = 0, start, 0, start
        while group < len(self._groups) and skip >= self._groups[group]:
            group, skip = group + 1, skip - self._groups[group]
        most = max(_LEAST_EXPANDED, _MOST_EXPANSION * self._bytes * (stop - start) // max(1, self.stop))
        groups, present = range(group, len(self._groups)), [name for name in wanted or () if name in self.names]
        # Without buffers for whole columns, of which one can be larger than memory.
        with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=_CHUNK) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=present, use_threads=False):
                part = batch.slice(skip, stop - row)
                skip, size = max(0, skip - len(batch)), size + part.nbytes
                if size > most:
                    problem = f"{self.path} has over {most:,} bytes in the rows before row {stop:,}, and states less"
                    raise UsageError(problem, "write the file again")
                columns = [_column(part.column(name)) for name in present]
                for values in zip(*columns, strict=True):
                    row += 1
                    yield _checked(values), row, row - start
                if row == stop:
                    return
        if present:
            raise UsageError(f"{self.path} ends after row {row:,}, and states {self.stop:,}", "write the file again")


def _lines(stream: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """Yield each line, with at most one byte more than a record can have, and the byte after it."""
    stream.seek(start)
    while start < stop and (line := stream.readline(min(MAX_RECORD_BYTES + 1, stop - start))):
        start, rest = start + len(line), line
        while not rest.endswith(b"\n") and start < stop and (rest := stream.readline(min(_CHUNK, stop - start))):
            start += len(rest)
        yield line, start


def _object(line: bytes) -> dict[str, Any] | Problem | None:
    """Return the JSON object of a line, None for a blank one."""
    if len(line) > MAX_RECORD_BYTES:
        return _TOO_LARGE
    try:
        value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None
        return Problem("not_json", f"the line is not JSON: {error}") if isinstance(_decoded(line), str) else _NOT_UTF8
    return value if isinstance(value, dict) else Problem("not_json", "the line is not a JSON object")


def _text(field: str) -> str | Problem:
    return field if field.isascii() else _decoded(field.encode("latin-1"))


def _decoded(data: bytes) -> str | Problem:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _column(column: Any) -> list[Any]:
    """Return the values of a column of Parquet. In place of one that is not UTF-8 is the problem."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if len(column) == 1:
            return [_NOT_UTF8]
        return [value for place in range(len(column)) for value in _column(column.slice(place, 1))]
    return found


def _checked(values: Sequence[Any]) -> Sequence[Any] | Problem:
    return next((value for value in values if isinstance(value, Problem)), values)


def open_file(path: Path, wanted: Sequence[str]) -> JsonLines:
    """Return an input. `wanted`: names of columns. Raises `UsageError` for a file that cannot be read."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file", "name files, such as `'FOLDER/*.jsonl'`, or `-` for stdin")
    with path.open("rb") as stream:
        if stream.read(4).startswith(_COMPRESSED):
            raise UsageError(f"{path} is compressed", f"decompress it: `zcat {path.name} | inferctl embed - ...`")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLines(path)
    if suffix in (".csv", ".tsv"):
        return Csv(path, wanted[0])
    if suffix == ".parquet":
        return Parquet(path, wanted)
    raise UsageError(f"the format of {path} is unknown", "rename it: .jsonl, .csv, .tsv (tabs) or .parquet")


def columns_of(files: Sequence[JsonLines], texts: tuple[str, ...], id_: str | None) -> Columns:
    """Return the columns, and the type of the ids from the first rows. Raises `UsageError` if a file lacks a column.

    `id_`: None for the column `id` if the first file has it, else numbers of rows.
    """
    found, whole = Columns(texts, id_ or ("id" if "id" in files[0].names else None)), True
    for file in files:
        if missing := [name for name in found.names if file.names and name not in file.names]:
            known = did_you_mean(missing[0], file.names) or f"it has {shown(', '.join(file.names))}"
            option = "--id" if missing[0] == found.id else "--text"
            raise UsageError(f"{file.path} has no column {missing[0]!r}", f"{known}; name a column with `{option}`")
        seen, problem = 0, None
        for values, _, _ in islice(file.records(file.start, file.stop, found.names), _SAMPLE_ROWS):
            if isinstance(values, Problem):
                problem = problem or values
            elif values:
                seen, value = seen + 1, values[-1]
                if found.id and value is not None:
                    whole &= _number(value) is not None and (isinstance(file, Csv) or type(value) is int)
        if problem and not seen:
            what = f"{file.path}: none of the first rows can be read: {problem.message}"
            raise UsageError(what, "check the format of the file, which its name says")
    return found._replace(whole=whole)


def read(file: JsonLines, range_: Range, columns: Columns) -> Rows:
    """Return the rows of a range."""
    rows, line = Rows([], [], [], []), range_.line
    for number, (values, _, lines) in enumerate(file.records(range_.start, range_.stop, columns.names), range_.first):
        found = values if isinstance(values, Problem) or not values else _input(values, columns, number)
        if isinstance(found, Problem):
            rows.problems.append(found._replace(line=line))
        elif found:
            rows.ids.append(found[0])
            rows.lines.append(line)
            rows.inputs.append(found[1])
        line = range_.line + lines
    return rows


def _input(values: Sequence[Any], columns: Columns, number: int) -> tuple[int | str, Input] | Problem:
    """Return the id and the text, or the pair of texts, of a row."""
    id_: Any = number
    if columns.id is not None:
        value = values[-1]
        id_ = _number(value) if columns.whole else str(value) if type(value) in (str, int) else None
        if id_ is None:
            kind = "a whole number, as in the first rows" if columns.whole else "a text or a whole number"
            return Problem("bad_id", "it has no id" if value is None else f"the id {shown(value)} is not {kind}")
    for name, text in zip(columns.texts, values, strict=False):
        if not isinstance(text, str):
            what = "has no value" if text is None else f"is {shown(text)}, not a text"
            return Problem("no_text", f"the column {name!r} {what}", id=id_)
    return id_, values[0] if len(columns.texts) == 1 else (values[0], values[1])


def _number(value: Any) -> int | None:
    """Return a whole number of 64 bits, also from the text of one; None for other values."""
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,18}", value, re.ASCII):
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None
