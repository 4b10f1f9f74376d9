"""`inferctl catalog`: print base images, torch stacks and hardware, each fact with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from inferctl.cli import completion, console, options
from inferctl.cli.options import Json
from inferctl.core import document
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage, Hardware, Stack
from inferctl.facts.precision import PRECISIONS, support

_Entry = BaseImage | Stack | Hardware


def _key(offered: completion.Callback) -> Any:
    return typer.Argument(
        metavar="KEY", autocompletion=offered, help="Print every fact of this entry, with its source."
    )


app = options.group("catalog", "List known base images, torch stacks and hardware, with sources.")


@app.command()
def bases(key: Annotated[str | None, _key(completion.BASES)] = None, as_json: Json = False) -> None:
    """List base images: Python, CUDA, driver, end of life.

    Example: inferctl catalog bases cuda13.0
    """
    _print(
        key,
        catalog.base,
        ("base", "Python", "CUDA", "driver", "torch stack", "until"),
        [
            (b.key, b.python.version, b.cuda or "-", _driver(b.driver_floor), b.stack, str(b.end_of_life or "unknown"))
            for b in catalog.bases().values()
        ],
        catalog.bases(),
        as_json,
    )


@app.command()
def stacks(key: Annotated[str | None, _key(completion.STACKS)] = None, as_json: Json = False) -> None:
    """List torch stacks: CUDA, Python, driver, kernels.

    Example: inferctl catalog stacks torch2.13-cu130
    """
    _print(
        key,
        catalog.stack,
        ("stack", "CUDA", "Python", "driver", "GB", "kernels"),
        [
            (
                s.key,
                s.cuda or "-",
                s.python[0] if len(s.python) == 1 else f"{s.python[0]}-{s.python[-1]}",
                _driver(s.driver_floor),
                f"{(s.compressed_bytes + (s.vllm_bytes or 0)) / 1e9:.2f}" if s.compressed_bytes else "-",
                (" ".join(s.sm) + ("" if s.sm_complete else " ...") if s.sm else "unknown") if s.cuda else "-",
            )
            for s in catalog.stacks().values()
        ],
        catalog.stacks(),
        as_json,
        "GB: compressed download; kernels: compute capabilities (8.6 also runs on 8.9); `...`: more are possible",
    )


@app.command()
def hardware(key: Annotated[str | None, _key(completion.HARDWARE)] = None, as_json: Json = False) -> None:
    """List hardware: compute peaks, memory, bandwidth.

    Example: inferctl catalog hardware a100-40gb-mig-3g.20gb
    """
    _print(
        key,
        catalog.hardware,
        ("hardware", "cc", "SMs", "fp32", "fp16", "bf16", "int8", "GB", "GB/s"),
        [
            (
                h.key,
                h.compute_capability or "-",
                _figure(h.sm_count),
                *(_peak(h, precision) for precision in PRECISIONS),
                _figure(h.memory_bytes and h.memory_bytes / 1e9),
                _figure(h.bandwidth_gbs),
            )
            for h in catalog.hardware_profiles().values()
        ],
        catalog.hardware_profiles(),
        as_json,
        "dense peaks in TFLOP/s (int8: TOP/s); peaks of slices are derived; `emul.`: emulated, no peak",
    )


def _peak(part: Hardware, precision: str) -> str:
    emulated = part.kind == "cuda" and support(precision, part.traits).level == "emulated"
    return "emul." if emulated else _figure(part.peaks[precision])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _driver(floor: int | None) -> str:
    return "-" if floor is None else f">={floor}"


def _print(
    key: str | None,
    find: Callable[[str], _Entry],
    headings: tuple[str, ...],
    rows: list[tuple[str, ...]],
    entries: Mapping[str, _Entry],
    as_json: bool,
    note: str = "",
) -> None:
    """Print every fact of the entry `key` with its notes and sources, or the table of all entries and a note."""
    if key is not None:
        facts = asdict(find(key))
        console.result(facts, document.block(facts), as_json=as_json)
    elif as_json:
        console.document([asdict(each) for each in entries.values()])
    else:
        console.report(console.table(headings, rows, headings[:1], narrow=True))
        if note:
            console.note(note)
