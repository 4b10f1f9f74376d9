"""`inferctl capacity`: write the measured capacity of one replica, for `inferctl serve --capacity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, options
from inferctl.core import outputs
from inferctl.receipts import capacity as capacities
from inferctl.receipts import receipt

EPILOG = """\b
Examples:
  # Write the capacity that a search measured
  inferctl capacity bench-results/search-20260102-030405/receipts/bf16.json -o capacity.json
  # Start a server that uses it for admission control
  inferctl serve --model DIR --precision bf16 --capacity capacity.json
"""


def capacity(
    receipt_file: Annotated[Path, typer.Argument(metavar="RECEIPT.json", help="Receipt of `inferctl bench`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the capacity to FILE instead of stdout."),
    ] = None,
    slo: Annotated[
        float | None,
        typer.Option(
            "--slo",
            metavar="MS",
            min=options.MIN_SLO_MS,
            max=options.MAX_SLO_MS,
            help="Set the p99 SLO for admission control. [default: the receipt's]",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Write the measured capacity from a receipt, for `inferctl serve --capacity`.

    Prints one JSON document or, with --output, the path of the file. Rejects altered and invalid receipts.
    A receipt of a search has an SLO already and rejects a different --slo.
    """
    if output is not None:
        outputs.check(output, "--output", parents=True, inputs=[receipt_file])
    sealed = receipt.load(receipt_file)
    document = capacities.capacity(sealed, slo)
    if sealed.data["quality"].get("passes") is False:
        console.warn(f"{sealed.name} is below the quality limits of its plan: do not serve it")
    console.note(capacities.sentence(document))
    if output is None:
        console.document(document)
        return
    outputs.write(output, json.dumps(document, indent=1) + "\n", "--output")
    console.result(document, str(output), as_json=json_)
