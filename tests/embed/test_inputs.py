"""Reading files in ranges: the rows do not depend on how a file is divided, and hostile files take little memory."""

from __future__ import annotations

import csv
import io
import json
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from inferctl.core.errors import UsageError
from inferctl.embed import inputs
from inferctl.embed.inputs import Rows


def rows_of(file: Path, texts: tuple[str, ...] = ("text",), id_: str | None = None, most: int = 1000) -> Rows:
    """Return all rows of a file that is divided into ranges of at most `most` rows."""
    opened = inputs.open_file(file, (*texts, id_ or "id"))
    columns = inputs.columns_of([opened], texts, id_)
    rows = Rows([], [], [], [])
    for range_ in opened.divide(0, 0, most, 2**23):
        assert range_.rows <= most
        for all_, own in zip(rows, inputs.read(opened, range_, columns), strict=True):
            all_ += own  # type: ignore[operator]
    return rows


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options)
    return stream.getvalue()


def not_utf8() -> bytes:
    import pyarrow as pa

    values, offsets = pa.py_buffer(b"a\xffc"), pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(4)))
    return parquet({"text": pa.StringArray.from_buffers(3, offsets, values)})


@contextmanager
def memory_below(most: int) -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most


def damaged(old: bytes, new: bytes) -> bytes:
    """Return a file of 100 texts, with other bytes in their place."""
    texts = [f"Text {n}" for n in range(1, 101)]
    content = parquet({"text": texts}, compression="none", use_dictionary=False, write_statistics=False)
    return content.replace(b"\x08\x00\x00\x00" + old, bytes([255] * 4) + old).replace(old, new)


OBJECTS = b"""\xef\xbb\xbf{"id": 1, "text": "a"}

{"id": 2, "text": "\xff"}
{"id": 3}
{"id": 4, "text": 7}
no
[1]
{"text": "b"}
{"id": "x", "text": "c"}
{"id": 5, "text": "\\ud800"}\r
{"id": 6, "text": "d\\n"}"""
BAD = [
    (3, "not_utf8"),
    (4, "no_text"),
    (5, "no_text"),
    (6, "not_json"),
    (7, "not_json"),
    (8, "bad_id"),
    (10, "not_json"),
]
QUOTED = '\ufeffid,text\r\n1,"a,\r\n""b"""\r\n\r\n2,ä\r\n3\r\n4,"open\r\n5,c\r\n'.encode() + b"6,\xe4\r\n"
TABLE = {"id": [1, 2, None, 4, 5], "text": ["a", "b", "c", None, "e"], "x": [b"\xff"] * 5}
PAIRS = b'{"q":"a","d":"b"}\n{"q":"a"}\n'
# File, content, columns; id, line and input of each row; line and code of each problem.
FILES: list[tuple[str, Any, tuple[Any, ...], list[tuple[Any, int, Any]], list[tuple[int, str]]]] = [
    ("a.jsonl", OBJECTS, (("text",),), [("1", 1, "a"), ("x", 9, "c"), ("6", 11, "d\n")], BAD),
    ("a.json", b'{"text":"a"}\n\n{"text":"b"}\n', (("text",),), [(0, 1, "a"), (2, 3, "b")], []),
    ("a.ndjson", b'{"id":"1","text":"a"}', (("text",),), [("1", 1, "a")], []),
    ("a.jsonl", PAIRS, (("q", "d"),), [(0, 1, ("a", "b"))], [(2, "no_text")]),
    (
        "a.csv",
        QUOTED,
        (("text",),),
        [(1, 2, 'a,\r\n"b"'), (2, 5, "ä"), (5, 8, "c")],
        [(6, "no_text"), (7, "not_csv"), (9, "not_utf8")],
    ),
    ("a.csv", b"nr;body\n007;a\n", (("body",), "nr"), [("007", 2, "a")], []),
    ("a.tsv", b"text\tx\na,b\t1\n", (("text",),), [(0, 2, "a,b")], []),
    (
        "a.parquet",
        lambda: parquet(TABLE, row_group_size=2),
        (("text",),),
        [(1, 1, "a"), (2, 2, "b"), (5, 5, "e")],
        [(3, "bad_id"), (4, "no_text")],
    ),
    ("a.parquet", not_utf8, (("text",),), [(0, 1, "a"), (2, 3, "c")], [(2, "not_utf8")]),
]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@pytest.mark.parametrize("case", FILES, ids=lambda case: case[0])
def test_rows_do_not_depend_on_the_ranges(case: tuple[Any, ...], most: int, tmp_path: Path) -> None:
    name, content, columns, expected, problems = case
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    rows = rows_of(tmp_path / name, *columns, most=most)
    assert list(zip(rows.ids, rows.lines, rows.inputs, strict=True)) == expected
    assert [(problem.line, problem.code) for problem in rows.problems] == problems


@hypothesis.given(
    strategies.lists(strategies.text(strategies.sampled_from('ab",;\n\r\t ä'), max_size=6), min_size=1, max_size=12),
    strategies.integers(1, 4),
)
def test_any_csv_is_read_as_the_library_reads_it(tmp_path_factory: Any, texts: Sequence[str], most: int) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text", "x"], *([text, "x"] for text in texts)])
    assert rows_of(file, most=most).inputs == list(texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("start", [b"", b'{"text": "', b'text\n"a'])
def test_a_line_without_an_end_takes_little_memory(name: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    good = b'{"text": "b"}\n' if name == "a.jsonl" else b"text\nb\n"
    with file.open("wb") as stream:
        stream.write(good + start)
        stream.seek(2**28, os.SEEK_CUR)
        stream.write(b"\n" + good)
    with memory_below(2**27):
        rows = rows_of(file)
    assert rows.inputs[0] == rows.inputs[-1] == "b"
    assert "record_too_large" in {problem.code for problem in rows.problems}


@pytest.mark.parametrize("most", [7, 65_536])
def test_quotes_that_stay_open_are_not_read_once_for_each_line(most: int, tmp_path: Path) -> None:
    # Whether a record begins with a line or has it inside, its last quote is open.
    (tmp_path / "a.csv").write_bytes(b"text,x\nb,\n" + b'a","\n' * 2000)
    rows = rows_of(tmp_path / "a.csv", most=most)
    assert rows.inputs[0] == "b"
    assert len(rows.problems) < 500
    assert "more lines are left out" in rows.problems[0].message


def test_the_sample_of_large_records_takes_the_memory_of_one(tmp_path: Path) -> None:
    record = {"text": "a" * 2**21, "x": [[]] * 20_000}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 20)
    with memory_below(3 * 2**24):
        opened = inputs.open_file(tmp_path / "a.jsonl", ("text", "id"))
        inputs.columns_of([opened], ("text",), None)


def test_rows_without_bytes_of_their_own_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_ROWS_PER_BYTE", 1)
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["a"] * 10**5}))
    with pytest.raises(UsageError, match="states 100,000 rows"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"txt":"a"}', "`--text`"),
        ("a.csv", b"id,body\n1,a\n", "`--text`"),
        ("a.jsonl", json.dumps([{"text": "a"}]).encode(), "its name says"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "zcat"),
        ("a.txt", b"a", ".jsonl"),
        ("a.parquet", b"PAR1 and no more", "write the file again"),
        ("a.parquet", lambda: parquet({"text": [[1]]}), "strings"),
        ("a.parquet", lambda: damaged(b"Text 100", bytes(8)), "write the file again"),
        ("a.parquet", lambda: damaged(b"\x16\xc8\x01", b"\x16\xfe\x01"), "write the file again"),  # 100 rows -> 127
    ],
)
def test_a_file_without_the_text_is_refused_at_the_start(name: str, content: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    with pytest.raises(UsageError) as caught:
        rows_of(tmp_path / name)
    assert named in str(caught.value.hint)
