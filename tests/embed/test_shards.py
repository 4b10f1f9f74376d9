"""The formats of shards: what a reader finds in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.embed import shards
from inferctl.reading.outputs import Form, Outputs, pack

DENSE = np.array([[1.5, -2, 3], [0, 1, -1]], np.float32)
TOKENS = [np.ones((2, 2), np.float32), np.zeros((0, 2), np.float32)]
ALL = Form.DENSE | Form.SPARSE | Form.TOKENS
PACKED = [
    pack(ALL, Outputs(dense, np.array([4, 9]), np.array([0.5, 2], np.float32), tokens))
    for dense, tokens in zip(DENSE, TOKENS, strict=True)
]
EMBED: dict[str, Any] = {"task": "embed", "outputs": ["dense"], "dimensions": 3, "token_dimensions": 2}
SPARSE = [{"indices": [4, 9], "values": [0.5, 2.0]}] * 2
SCORES = np.array([[0.25, 0.75], [1, 0]], np.float32)
# Rows, identity, type -> the columns.
CASES: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "dense": (DENSE, EMBED, "float32", {"embedding": DENSE.tolist()}),
    "float16": (DENSE, EMBED, "float16", {"embedding": DENSE.tolist()}),
    "bits": (DENSE, EMBED, "bits", {"embedding": [[0b10100000], [0b01000000]]}),
    "all outputs": (
        PACKED,
        {**EMBED, "outputs": ["dense", "sparse", "tokens"]},
        "float32",
        {"embedding": DENSE.tolist(), "sparse_embedding": SPARSE, "token_embeddings": [[[1, 1], [1, 1]], []]},
    ),
    "pairs": (SCORES[:, :1], {"task": "rerank"}, "float32", {"score": [0.25, 1]}),
    "labels": (
        SCORES,
        {"task": "classify", "labels": ["no", "yes"]},
        "float32",
        {"label": ["yes", "no"], "scores": SCORES.tolist()},
    ),
}


def written(folder: Path, case: str, format_: Any, ids: list[Any]) -> dict[str, Any]:
    rows, identity, dtype, _ = CASES[case]
    rows = rows[: len(ids)]
    options = {"dtype": dtype, "format": format_, "columns": [["text"], "id", False]}
    return shards.write(folder, 7, ids, rows, [], {**identity, **options})


@pytest.mark.parametrize("ids", [["a", "b"], []], ids=["rows", "empty"])
@pytest.mark.parametrize("case", CASES)
def test_parquet_and_json_lines_have_the_rows(case: str, ids: list[str], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    expected = [dict(zip(CASES[case][3], row, strict=True)) for row in zip(*CASES[case][3].values(), strict=True)]
    rows = [{"id": id_, **row} for id_, row in zip(ids, expected, strict=False)]
    files = written(tmp_path, case, "parquet", ids) | written(tmp_path, case, "jsonl", ids)
    assert (
        files["part-00007.parquet"]["sha256"]
        == hashlib.sha256((tmp_path / "part-00007.parquet").read_bytes()).hexdigest()
    )
    table = pq.read_table(tmp_path / "part-00007.parquet")
    assert table.to_pylist() == rows
    assert json.loads(table.schema.metadata[b"inferctl"])["task"] == CASES[case][1]["task"]
    assert [json.loads(line) for line in (tmp_path / "part-00007.jsonl").read_text().splitlines()] == rows


def test_a_range_is_done_unless_its_files_were_changed(tmp_path: Path) -> None:
    file, facts = tmp_path / "part-00007.json", {"rows": 2, "files": written(tmp_path, "dense", "jsonl", ["a", "b"])}
    shards.mark_done(tmp_path, 7, facts)
    whole = file.read_bytes()
    assert (found := shards.done(tmp_path, 7)) and found.items() >= facts.items()
    for changed in (b"", b"[]", b"{}", whole.replace(b'"rows": 2', b'"rows": 3'), whole.replace(b"part", b"../p")):
        file.write_bytes(changed)
        assert shards.done(tmp_path, 7) is None
    file.write_bytes(whole)
    (tmp_path / "part-00007.jsonl").write_bytes(b"")
    assert shards.done(tmp_path, 7) is None


@pytest.mark.parametrize("case", ["dense", "float16", "bits", "pairs", "labels"])
def test_npy_has_the_numbers_and_their_ids(case: str, tmp_path: Path) -> None:
    written(tmp_path, case, "npy", ["a", "b"])
    array = np.load(tmp_path / "part-00007.npy", allow_pickle=False)
    assert array.tolist() == list(CASES[case][3].values())[-1]
    assert [json.loads(line)["id"] for line in (tmp_path / "part-00007.ids.jsonl").open()] == ["a", "b"]


@pytest.mark.parametrize(
    ("identity", "format_", "dtype"),
    [
        ({"task": "embed", "outputs": ["dense", "sparse"]}, "npy", "float32"),
        ({"task": "embed", "outputs": ["sparse"]}, "jsonl", "float16"),
        ({"task": "embed", "outputs": ["tokens"]}, "jsonl", "bits"),
        ({"task": "rerank"}, "jsonl", "bits"),
    ],
)
def test_formats_that_cannot_have_an_output_are_refused(identity: dict[str, Any], format_: Any, dtype: Any) -> None:
    with pytest.raises(UsageError):
        shards.check({**identity, "format": format_, "dtype": dtype})
