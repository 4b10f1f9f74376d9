"""The plan of a run: its inputs, what decides its rows, and its ranges. A run that continues must have the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from inferctl.core.errors import UsageError, shown
from inferctl.core.partials import synced_file
from inferctl.embed import inputs
from inferctl.embed.computer import Input
from inferctl.embed.inputs import Columns, JsonLines, Range
from inferctl.receipts.receipt import canonical

SCHEMA = "inferctl.embed/1"
_NOTHING = hashlib.sha256().hexdigest()
OutputFormat: TypeAlias = Literal["parquet", "npy", "jsonl"]
Dtype: TypeAlias = Literal["float32", "float16", "bits"]


@dataclass(frozen=True)
class RunOptions:
    """What is computed of which files, and where it goes.

    `inputs`: files and patterns. `texts`, `id`: columns. `model`: what decides the vectors, such as the digest of the
    model. `strict`: whether the first row that cannot be computed ends the run.
    """

    inputs: Sequence[str]
    output: Path
    texts: tuple[str, ...] = ("text",)
    id: str | None = None
    format: OutputFormat = "parquet"
    dtype: Dtype = "float32"
    model: Mapping[str, Any] = field(default_factory=dict)
    most_rows: int = 65_536
    most_bytes: int = 8 * 2**20
    strict: bool = False

    @property
    def decisive(self) -> dict[str, Any]:
        """What two runs with the same rows and ranges have in common, besides their inputs."""
        names = ("texts", "id", "format", "dtype", "most_rows", "most_bytes")
        found: dict[str, Any] = json.loads(canonical({**self.model, **{name: getattr(self, name) for name in names}}))
        return found


@dataclass(frozen=True)
class Manifest:
    """`inputs`: path, bytes, mtime_ns and sha256 of each. `options`: `RunOptions.decisive`.

    `digest`: of what decides the rows, so not of the places and times of the inputs.
    """

    inputs: list[dict[str, Any]]
    options: dict[str, Any]
    columns: Columns
    ranges: list[Range]

    @property
    def rows(self) -> int:
        return self.ranges[-1].first + self.ranges[-1].rows

    @property
    def digest(self) -> str:
        content = [self.options, self.columns, self.ranges, [each["sha256"] for each in self.inputs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_plan(options: RunOptions) -> tuple[Manifest, list[JsonLines]]:
    """Return the plan of the folder, made if there is none, and the inputs. Raises `UsageError` for another run."""
    file = options.output / "manifest.json"
    if not file.exists():
        if next(options.output.glob("part-*"), None):
            raise UsageError(f"{options.output} has shards without a manifest.json", "name a new or an empty folder")
        write_new(file, {"schema": SCHEMA, **vars(make(options)[0])})
    plan = _read(file)
    now, paths = options.decisive, expand(options.inputs)
    changes = [
        f"{name} was {shown(plan.options.get(name))} and is {shown(now.get(name))}"
        for name in {**plan.options, **now}
        if plan.options.get(name) != now.get(name)
    ]
    if len(paths) != len(plan.inputs):
        changes.append(f"the number of inputs was {len(plan.inputs)} and is {len(paths)}")
    for path, known in zip(paths, plan.inputs, strict=False):
        if _known(path) != {**known, "sha256": None} and _digest(path) != known["sha256"]:
            changes.append(f"{path} is not the {known['path']} of the start ({known['bytes']:,} bytes)")
    if changes:
        raise UsageError(
            f"{options.output} has another run: {'; '.join(changes)}",
            "repeat the command of that run to continue it, or name another folder with `--output`",
        )
    return plan, [inputs.open_file(path, plan.columns.names) for path in paths]


def make(options: RunOptions) -> tuple[Manifest, list[JsonLines]]:
    """Divide the inputs into ranges. Reads all of them."""
    paths = expand(options.inputs)
    files = [inputs.open_file(path, (*options.texts, options.id or "id")) for path in paths]
    columns = inputs.columns_of(files, options.texts, options.id)
    found, ranges = [{**_known(path), "sha256": _digest(path)} for path in paths], list[Range]()
    for number, file in enumerate(files):
        first = ranges[-1].first + ranges[-1].rows if ranges else 0
        ranges += file.divide(number, first, options.most_rows, options.most_bytes)
    if not ranges:
        raise UsageError(f"the inputs have no rows: {', '.join(map(str, paths))[:200]}", "name other files")
    return Manifest(found, options.decisive, columns, ranges), files


def _read(file: Path) -> Manifest:
    try:
        data = json.loads(file.read_bytes())
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {shown(data['schema'])}, this version has {SCHEMA}")
        texts, *rest = data["columns"]
        ranges = [Range(*each) for each in data["ranges"]]
        return Manifest(data["inputs"], data["options"], Columns(tuple(texts), *rest), ranges)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{file} is not a plan of `inferctl embed`: {error}", "name another folder") from None


def sample(plan: Manifest, files: Sequence[JsonLines], count: int) -> list[Input]:
    """Return inputs from all parts of the files."""
    some = plan.ranges[:: -(-len(plan.ranges) // 16)]
    rows = [inputs.read(files[each.file], each, plan.columns).inputs for each in some]
    return [text for texts in rows for text in texts[:: max(1, len(texts) * len(some) // count)]][:count]


def expand(patterns: Sequence[str]) -> list[Path]:
    """Return the files of names and patterns, those of a pattern sorted. Raises `UsageError` for one without a file."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matching = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))  # noqa: PTH207  # absolute ones too
        if not matching:
            raise UsageError(f"{pattern} not found", "name files, such as `'FOLDER/*.jsonl'`, or `-` for stdin")
        found |= dict.fromkeys(map(Path, matching))
    return list(found)


def spool(stream: BinaryIO, folder: Path) -> Path:
    """Return a file of the folder with the JSON lines of stdin, which a run that continues reads again.

    If the file exists, stdin must have the same content or none. Raises `UsageError`.
    """
    file = folder / "stdin.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with synced_file(file) as to:
            shutil.copyfileobj(stream, to, 2**20)
    elif hashlib.file_digest(stream, "sha256").hexdigest() not in (_NOTHING, _digest(file)):  # type: ignore[arg-type]
        raise UsageError(f"stdin is not the {file} of the start", "name another folder with `--output`")
    return file


def write_new(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, unless it exists. If two processes write it, each must read it again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with synced_file(file) as to:
            to.write(json.dumps(value, separators=(",", ":")).encode())


def _known(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"path": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": None}


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
