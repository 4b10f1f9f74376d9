"""`inferctl capacity`: what one replica can do, out of a receipt, as the file that `inferctl serve --capacity` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, options

EPILOG = """Examples: `inferctl capacity bench-results/search-20260102-030405/receipts/bf16.json -o capacity.json`, then
`inferctl serve --model DIR --precision bf16 --capacity capacity.json` admits by it from the first request on."""


def capacity(
    receipt_file: Annotated[Path, typer.Argument(metavar="RECEIPT.json", help="A receipt of `inferctl bench`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to FILE instead of stdout.")
    ] = None,
    slo: Annotated[
        float | None,
        typer.Option(
            "--slo",
            metavar="MS",
            min=options.MIN_SLO_MS,
            max=options.MAX_SLO_MS,
            help="p99 to admit by, instead of the receipt's; refused where a search held another.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Turn a receipt into the capacity that admission and manifests read.

    Prints one JSON document; with --output, the file's path. Refuses receipts that were altered or are of an invalid run.
    """
    from inferctl import outputs
    from inferctl.bench import receipt
    from inferctl.bench.report import capacity as capacities

    if output is not None:
        outputs.check(output, "--output", parents=True, inputs=[receipt_file])
    sealed = receipt.load(receipt_file)
    found = capacities.capacity(sealed, slo)
    if sealed.data["quality"].get("passes") is False:
        console.warn(f"{sealed.name} fails on quality: it should not be served")
    if caution := (sealed.data.get("search") or {}).get("caution"):
        console.warn(f"{sealed.name} at the max goodput: {caution}")
    console.note(capacities.sentence(found))
    if output is None:
        console.document(found)
        return
    outputs.write(output, json.dumps(found, indent=1) + "\n", "--output")
    if json_:
        console.document(found)
    else:
        console.data(str(output))
