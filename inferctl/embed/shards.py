"""Writes the rows of a range as a shard, the rows without a result, and then that the range is done.

A shard gets its name when all of it is on disk. `part-00000.json` is written last and has the sizes and hashes of the
others, so it alone says that a range is done. Two processes that compute one range write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import orjson

from inferctl.core.errors import UsageError, needs_packages
from inferctl.core.partials import synced_file
from inferctl.embed.manifest import Dtype
from inferctl.models.vector_format import VectorFormat, convert
from inferctl.reading.outputs import FORMS, Form, unpack
from inferctl.reading.rows import Rows
from inferctl.receipts.receipt import canonical, seal_of

VECTOR_FORMATS: dict[Dtype, VectorFormat] = {"float32": "float", "float16": "float16", "bits": "ubinary"}
# What `Computer.start` returned, and the options of the run.
Identity: TypeAlias = Mapping[str, Any]


def check(identity: Identity) -> None:
    """Raise `UsageError` if the rows of a model cannot be written in a format, `NotReadyError` without its package."""
    outputs = set(identity["outputs"]) if identity["task"] == "embed" else set()
    dtype, format_ = identity["dtype"], identity["format"]
    if format_ == "npy" and outputs - {"dense"}:
        raise UsageError(f"`--format npy` has no place for {', '.join(sorted(outputs))}", "use parquet or jsonl")
    if dtype != "float32" and (not outputs or outputs & {"sparse"} or (dtype == "bits" and "dense" not in outputs)):
        raise UsageError(f"these outputs cannot be written as {dtype}", "remove `--dtype`")
    if format_ == "parquet":
        with needs_packages("`--format parquet`", "embed"):
            import pyarrow.parquet  # noqa: F401


def columns(rows: Rows, identity: Identity) -> dict[str, Any]:
    """Return the columns of a shard, besides the id: an array or a list with a value for each row."""
    count = len(rows)
    if identity["task"] == "rerank":
        return {"score": np.asarray(rows, np.float32).reshape(count)}
    if identity["task"] == "classify":
        labels = identity["labels"]
        scores = np.asarray(rows, np.float32).reshape(count, len(labels))
        return {"label": [labels[place] for place in scores.argmax(axis=1)], "scores": scores}
    outputs, size, token_size = identity["outputs"], identity["dimensions"], identity["token_dimensions"]
    found: dict[str, Any] = {}
    dense = rows
    if list(outputs) != ["dense"]:
        form = Form(sum(FORMS[name] for name in outputs))
        unpacked = [unpack(np.asarray(row), form, size, token_size) for row in rows]
        dense = [row.dense for row in unpacked]
        if "sparse" in outputs:
            found["sparse_embedding"] = [{"indices": row.ids, "values": row.weights} for row in unpacked]
        if "tokens" in outputs:
            kind = np.float16 if identity["dtype"] == "float16" else np.float32
            found["token_embeddings"] = [row.tokens.reshape(-1, token_size).astype(kind) for row in unpacked]
    if "dense" in outputs:
        vectors = np.asarray(dense, np.float32).reshape(count, size)
        found = {"embedding": convert(vectors, VECTOR_FORMATS[identity["dtype"]]), **found}
    return found


def write(
    folder: Path, number: int, ids: Sequence[Any], rows: Rows, errors: Sequence[Mapping[str, Any]], identity: Identity
) -> dict[str, Any]:
    """Write a shard and its errors, and return the size and the hash of each file by its name."""
    name, values = f"part-{number:05}", columns(rows, identity)
    files: dict[str, Callable[[BinaryIO], Any]] = {}
    if identity["format"] == "parquet":
        files[f"{name}.parquet"] = lambda to: _write_parquet(to, ids, values, {**identity, "range": number})
    elif identity["format"] == "npy":
        array = next(value for value in values.values() if isinstance(value, np.ndarray))
        files[f"{name}.npy"] = lambda to: np.save(to, array, allow_pickle=False)
        files[f"{name}.ids.jsonl"] = lambda to: to.writelines(_lines({"id": ids}))
    else:
        files[f"{name}.jsonl"] = lambda to: to.writelines(_lines({"id": ids, **values}))
    if errors:
        lines = b"".join(orjson.dumps(error, option=orjson.OPT_APPEND_NEWLINE) for error in errors)
        files[f"{name}.errors.jsonl"] = lambda to: to.write(lines)
    return {file: _publish(folder / file, fill) for file, fill in files.items()}


def mark_done(folder: Path, number: int, facts: Mapping[str, Any]) -> None:
    """Write that a range is done."""
    with synced_file(folder / f"part-{number:05}.json") as to:
        to.write(json.dumps({**facts, "seal": seal_of(dict(facts))}).encode())


def done(folder: Path, number: int) -> dict[str, Any] | None:
    """Return what `mark_done` wrote, None if the range is not done, or this or the size of a file was changed."""
    try:
        facts: dict[str, Any] = json.loads((folder / f"part-{number:05}.json").read_bytes())
        whole = facts["seal"] == seal_of(facts)
        whole = whole and all((folder / name).stat().st_size == each["bytes"] for name, each in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return facts if whole else None


def _publish(path: Path, fill: Callable[[BinaryIO], Any]) -> dict[str, Any]:
    with synced_file(path) as to:
        fill(to)
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _lines(values: Mapping[str, Sequence[Any]]) -> Iterator[bytes]:
    for row in zip(*values.values(), strict=True):
        entry = dict(zip(values, row, strict=True))
        yield orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _write_parquet(to: BinaryIO, ids: Sequence[Any], values: Mapping[str, Any], identity: Identity) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fixed(array: Any) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])

    def lists(arrays: Sequence[Any], empty: Any) -> Any:
        offsets, joined = pa.array(np.cumsum([0, *map(len, arrays)]), pa.int32()), np.concatenate([*arrays, empty])
        return pa.ListArray.from_arrays(offsets, fixed(joined) if joined.ndim == 2 else pa.array(joined))

    found = {"id": pa.array(ids, pa.int64() if identity["columns"][2] else pa.string())}
    for name, value in values.items():
        if name == "sparse_embedding":
            indices = lists([row["indices"] for row in value], np.empty(0, np.int32))
            weights = lists([row["values"] for row in value], np.empty(0, np.float32))
            found[name] = pa.StructArray.from_arrays([indices, weights], ["indices", "values"])
        elif name == "token_embeddings":
            kind = np.float16 if identity["dtype"] == "float16" else np.float32
            found[name] = lists(value, np.empty((0, identity["token_dimensions"]), kind))
        elif name == "label":
            found[name] = pa.array(value, pa.string())
        else:
            found[name] = fixed(value) if value.ndim == 2 else pa.array(value)
    table = pa.table(found).replace_schema_metadata({"inferctl": canonical(identity)})
    # Numbers of vectors do not compress. The bytes of bits are stored as 32 bits without a dictionary.
    dictionary = ["label", "embedding.list.element"] if identity["dtype"] == "bits" else ["label"]
    pq.write_table(table, to, compression={"id": "zstd"}, use_dictionary=dictionary, write_statistics=["id"])
