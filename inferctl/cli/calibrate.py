"""`inferctl calibrate`: find the range of each dimension of a model's vectors, which int8 and uint8 need."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from inferctl.cli import console, options
from inferctl.core.errors import InferctlError, UsageError
from inferctl.models import model as model_folder

if TYPE_CHECKING:
    from inferctl.bench.load.target import ServerConnection
    from inferctl.config.spec import Spec
    from inferctl.models.vector_format import Matrix, Ranges

EPILOG = """\b
Examples:
  # With texts like those that will be embedded, one in each line
  inferctl calibrate ./bge-small texts.txt
  # For vectors of 256 and of all dimensions
  inferctl calibrate ./bge-small texts.jsonl --dimensions 256 --dimensions 384
"""
_BATCH = 16
_FEWEST, _MOST_HELD_OUT = 100, 2000


def calibrate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the model; it gets vector_ranges.json.")],
    texts: Annotated[
        str, typer.Argument(metavar="TEXTS", help="A .txt or .jsonl file (key text), or a corpus of the benchmarks.")
    ],
    dimensions: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            max=65_536,
            help="Calibrate vectors of N dimensions; repeat it. [default: all dimensions]",
        ),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=_FEWEST, max=100_000, help="Use at most N texts.")] = 2000,
    precision: options.PrecisionOption = None,
    as_json: options.Json = False,
) -> None:
    """Find the range of each dimension, so that the server can return int8 and uint8 (`output_dtype`).

    Starts a server of the model, embeds the texts, and writes FOLDER/vector_ranges.json. The table shows what each
    number format costs: the share of the 10 nearest texts by float32 that are also found with it, of texts that did not
    count for the ranges.
    """
    import numpy as np

    from inferctl.bench.measure import quality
    from inferctl.bench.plan import workload
    from inferctl.models import vector_format

    found = model_folder.find(str(folder))
    if not model_folder.is_folder(folder):
        raise UsageError(f"{folder} is not a folder", "pass the folder of a model: `inferctl calibrate FOLDER TEXTS`")
    given = list(dict.fromkeys(workload.read_corpus(texts)[0]))[:count]
    if len(given) < _FEWEST:
        raise UsageError(
            f"{texts} has {len(given)} different texts, and ranges need {_FEWEST}",
            "use texts like those that are embedded",
        )
    loaded = options.load(None, {"model.source": str(folder), "serve.precision": precision})
    earlier = _earlier(found)
    vectors, precision_used = _embed(found, given, loaded.spec, sorted(set(dimensions or ())))
    # Every fifth text, or fewer, shows the loss, and then counts too.
    held_out = np.arange(len(given)) % max(5, len(given) // _MOST_HELD_OUT) == 0
    losses = {
        size: quality.compact(rows[held_out], rows[held_out], vector_format.Ranges.of(rows[~held_out]))
        for size, rows in vectors.items()
    }
    ranges = earlier | {size: vector_format.Ranges.of(rows) for size, rows in vectors.items()}
    file = vector_format.write(found.path, found.digest, ranges, {"texts": len(given), "precision": precision_used})
    if as_json:
        console.document({"file": str(file), "texts": len(given), "precision": precision_used, "loss": losses})
        return
    table = Table("dimensions", "output_dtype", box=None)
    for heading in ("bytes", "recall@10"):
        table.add_column(heading, justify="right")
    for size, rows in losses.items():
        for row in rows:
            table.add_row(str(size), row["output_dtype"], f"{row['bytes']:,}", f"{row['recall_at_10']:.3f}")
    console.report(table)
    console.data(str(file))


def _earlier(found: model_folder.ModelFolder) -> dict[int, Ranges]:
    """Return the ranges that the folder has. A file that is of no use is removed: a server would not start with it."""
    from inferctl.models import vector_format

    try:
        return vector_format.read(found.path, lambda: found.digest)
    except UsageError as error:
        console.note(f"{error.message}: replacing it")
        (found.path / model_folder.VECTOR_RANGES).unlink()
        return {}


def _embed(
    found: model_folder.ModelFolder, texts: list[str], spec: Spec, sizes: list[int]
) -> tuple[dict[int, Matrix], str]:
    """Return the vectors of the texts by number of dimensions, and the precision of the server."""
    from inferctl.bench.load import child_server

    command = child_server.serve_command(str(found.path.resolve()), spec.name, None)
    with (
        tempfile.TemporaryDirectory(prefix="inferctl-calibrate-") as work,
        console.progress("starting the server") as say,
    ):
        announce = Path(work) / "server.json"
        try:
            with child_server.serve(
                command(spec.serve.precision, announce, None), announce, Path(work), lambda _: None
            ) as server:
                connection = server.connection
                say(f"embedding {len(texts):,} texts")
                vectors = {size: _vectors(connection, texts, size) for size in sizes or [_dimensions(connection)]}
        except child_server.ServerError as error:
            hint = f"see its log: `inferctl serve --model {found.path}`"
            raise InferctlError(f"the server did not start: {error.reason}", hint) from None
    return vectors, str(connection.info["precision"]["effective"])


def _dimensions(server: ServerConnection) -> int:
    if server.task != "embed":
        raise UsageError(
            f"{server.model} is served for the task {server.task}, and has no vectors", "name another model"
        )
    return int(server.info["model"]["dimensions"])


def _vectors(server: ServerConnection, texts: list[str], size: int) -> Matrix:
    import numpy as np

    from inferctl.bench.load.http_json import StatusError

    whole = _dimensions(server)
    options: dict[str, Any] = {} if size == whole else {"dimensions": size}
    rows: list[Any] = []
    for start in range(0, len(texts), _BATCH):
        try:
            rows += server.embed(texts[start : start + _BATCH], **options)
        except StatusError as error:
            if error.status != 400:
                raise
            raise UsageError(error.message, "see `dimensions` in the documentation of the model") from None
    return np.asarray(rows, np.float32)
