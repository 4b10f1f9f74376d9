"""`inferctl bench --start`: measure how long a container of an image takes to its first response."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from inferctl.bench.load.target import connect
from inferctl.cli import console, download, options
from inferctl.cli.bench_setup import create_folder
from inferctl.core import outputs
from inferctl.core.errors import InferctlError, UsageError
from inferctl.image import container_start, serve_image
from inferctl.image.container_start import ContainerStart
from inferctl.image.docker import DockerEngine
from inferctl.image.image_name import full_reference

_TEXT = "A container serves its first request."
_ROUNDS, _MAX_ROUNDS = 3, 100
_ROWS = ("pull and unpack", "start of the container", "until the first response", "all")


def measure(
    reference: str, spec_file: Path | None, model: str | None, rounds: int | None, output: Path, as_json: bool
) -> None:
    """Measure the starts of an image, print them, and write start.json below `output`."""
    rounds = _ROUNDS if rounds is None else rounds
    if not 1 <= rounds <= _MAX_ROUNDS:
        raise UsageError(
            f"`--repeats {rounds}` is not allowed with `--start`", f"pass a number from 1 to {_MAX_ROUNDS}"
        )
    reference = full_reference(reference)
    spec = options.without_model(spec_file, {"model.source": model})
    engine = DockerEngine.connect()
    image = serve_image.get_or_pull(engine, reference, console.note)
    serve_image.check_inferctl_image(image, reference)
    source = spec.model.source if options.names_model(spec_file, {"model.source": model}) else None
    address = serve_image.Address("127.0.0.1", 0)
    named = serve_image.ServeOptions(address, source, spec.model.revision, model is not None)
    mounted = serve_image.weights(image, named, download.fetch)
    found = container_start.in_registry(image, reference) if image.digests else None
    if found is None:
        console.warn(f"{reference} is in no registry, so only starts with a warm store are measured")
    size_bytes = engine.size(image.id)
    folder_of_result = create_folder(output, "start")

    def respond(url: str) -> None:
        server = connect(url)
        server.request([_TEXT, _TEXT] if server.task == "rerank" else [_TEXT])

    try:
        with console.progress(f"starting {reference}") as describe:
            starts = list(container_start.measure(engine, reference, found, mounted, rounds, respond, describe))
    except BaseException:  # also Ctrl-C
        with suppress(InferctlError):
            if engine.image(reference) is None:
                console.warn(f"the engine does not have {reference} now: `docker pull {reference}` gets it back")
        raise
    document = {
        "image": {
            "reference": found.reference if found else image.id,
            "size_bytes": size_bytes,
            "compressed_bytes": found.compressed if found else None,
            "compression": found.method if found else None,
        },
        "starts": [asdict(each) for each in starts],
    }
    file = folder_of_result / "start.json"
    outputs.write(file, json.dumps(document, indent=1) + "\n", "--output")
    if as_json:
        console.document(document)
    else:
        console.report(_table(starts))
        for line in _remarks(starts):
            console.data(line)
    console.note(f"starts: {file}")


def _table(starts: Sequence[ContainerStart]) -> Table:
    pulls = [each.pull for each in starts if each.pull]
    kept = max((each.kept for each in pulls), default=0)
    pulled = f"{pulls[0].layers - kept} of {pulls[0].layers} layers pulled" if kept else "empty store"
    stores = {pulled: [each for each in starts if each.pull], "warm store": [s for s in starts if not s.pull]}
    columns = {name: _medians(found) for name, found in stores.items() if found}
    table = Table("seconds", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    for row, *values in zip(_ROWS, *columns.values(), strict=True):
        table.add_row(row, *(f"{value:.1f}" if value else "" for value in values))
    return table


def _medians(starts: Sequence[ContainerStart]) -> list[float]:
    """Return the median seconds of each row, and of all."""
    pulled = [each.pull.seconds if each.pull else 0.0 for each in starts]
    parts = (
        pulled,
        [each.container_s for each in starts],
        [each.response_s for each in starts],
        [each.seconds for each in starts],
    )
    return [statistics.median(values) for values in parts]


def _remarks(starts: Sequence[ContainerStart]) -> list[str]:
    """Return what the table does not show, in sentences."""
    pulls = [each.pull for each in starts if each.pull]
    lines = []
    if any(each.kept < each.layers for each in pulls):
        done = statistics.median(each.downloaded_s for each in pulls)
        lines.append(f"The last layer was downloaded {done:.1f} s after the start of the pull.")
    if kept := max((each.kept for each in pulls), default=0):
        lines.append(
            f"The engine kept {kept} of {pulls[0].layers} layers, which other images or its build cache share: a new "
            "node takes longer."
        )
    longest = max(each.seconds for each in starts)
    lines.append(f"For `inferctl deploy`: `deploy.cold_start_s` is {longest:.1f} s and the time of a new node.")
    return lines
