"""`inferctl catalog`: print base images, torch stacks and hardware, each fact with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from inferctl.cli import completion, console, options
from inferctl.cli.options import Json
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage, Hardware, Stack
from inferctl.facts.precision import PRECISIONS, support
from inferctl.image import base_facts, buildx
from inferctl.image.base_facts import BaseComparison

_KINDS = {"read": "", "derived": "derived: ", "own-choice": "inferctl's choice: "}


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
    if key is not None:
        _explain(catalog.base(key), as_json)
        return
    _list(
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
    if key is not None:
        _explain(catalog.stack(key), as_json)
        return
    _list(
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
    )
    if not as_json:
        console.note(
            "GB: compressed download; kernels: compute capabilities (8.6 also runs on 8.9); `...`: more are possible"
        )


@app.command()
def hardware(key: Annotated[str | None, _key(completion.HARDWARE)] = None, as_json: Json = False) -> None:
    """List hardware: compute peaks, memory, bandwidth.

    Example: inferctl catalog hardware a100-40gb-mig-3g.20gb
    """
    if key is not None:
        _explain(catalog.hardware(key), as_json)
        return
    _list(
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
    )
    if not as_json:
        console.note("dense peaks in TFLOP/s (int8: TOP/s); peaks of slices are derived; `emul.`: emulated, no peak")


@app.command()
def check(
    key: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY", autocompletion=completion.BASES, help="Check these bases or YAML files. [default: all bases]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the facts about base images with their registries.

    Exit code 1: a fact differs. Exit code 3: a registry cannot be read.

    Example: inferctl catalog check cuda13.0
    """
    rows: list[BaseComparison] = []
    failed: NotReadyError | None = None
    for base in [catalog.base(name) for name in key or catalog.bases()]:
        try:
            with console.progress(f"reading {base.reference}"):
                rows += base_facts.compare(base, buildx.remote_image(base.reference, base.platforms[0]))
        except UsageError as error:
            rows.append(base_facts.BaseComparison(base.key, "tag", "differs", base.reference, error.message))
        except NotReadyError as error:
            failed = failed or error
            rows.append(base_facts.BaseComparison(base.key, "tag", "unknown", base.reference, error.message))
    differs = any(row.verdict == "differs" for row in rows)
    if as_json:
        console.document(
            {
                "same": not differs and failed is None,
                "size_tolerance": base_facts.SIZE_TOLERANCE,
                "facts": [asdict(row) for row in rows],
            }
        )
    else:
        _compared(rows)
        console.note(f"sizes within {base_facts.SIZE_TOLERANCE:.0%} count as the same")
    if differs:
        raise typer.Exit(1)
    if failed:
        if as_json:
            raise typer.Exit(failed.exit_code)
        raise failed


def _compared(rows: list[BaseComparison]) -> None:
    headings = ("base", "fact", "verdict", "catalog", "registry")
    cells = [[text or "-" for text in (row.base, row.fact, row.verdict, row.recorded, row.found)] for row in rows]
    console.report(console.table(headings, cells, headings[:3], narrow=True))


def _peak(part: Hardware, precision: str) -> str:
    emulated = part.kind == "cuda" and support(precision, part.traits).level == "emulated"
    return "emul." if emulated else _figure(part.peaks[precision])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _driver(floor: int | None) -> str:
    return "-" if floor is None else f">={floor}"


def _list(
    headings: tuple[str, ...],
    rows: list[tuple[str, ...]],
    entries: Mapping[str, BaseImage] | Mapping[str, Stack] | Mapping[str, Hardware],
    as_json: bool,
) -> None:
    if as_json:
        console.document([asdict(entry) for entry in entries.values()])
        return
    console.report(console.table(headings, rows, headings[:1], narrow=True))


def _explain(entry: BaseImage | Stack | Hardware, as_json: bool) -> None:
    """Print every fact of one entry with its note and its source."""
    facts: dict[str, Any] = asdict(entry)
    if as_json:
        console.document(facts)
        return

    sources, notes = facts.pop("sources"), facts.pop("notes")
    if requirement := getattr(entry, "requirement", None):
        facts["require_cuda"] = requirement.describe()
    numbered = list(enumerate(sources, 1))
    cited = {fact: number for number, source in reversed(numbered) for fact in source["facts"]}
    rows = [
        (
            fact,
            _value(value) + (f"\n({notes[fact]})" if fact in notes else ""),
            f"[{cited[fact]}]" if fact in cited else "",
        )
        for fact, value in facts.items()
    ]
    rows += [(fact, f"({notes[fact]})", "") for fact in notes.keys() - facts.keys()]
    lines = [
        f"[{number}] {_KINDS[source['kind']]}{source['source']}" + (f", {source['date']}" if source["date"] else "")
        for number, source in numbered
    ]
    console.report(Group(console.table(("fact", "value", "source"), rows), Text(), Text("\n".join(lines))))


def _value(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "-"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        separator = "\n" if isinstance(value[0], dict) else ", "
        return separator.join(_priced(item) if isinstance(item, dict) else str(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 99999 else str(value)


def _priced(price: dict[str, Any]) -> str:
    return (
        f"{price['usd_per_hour']} USD/h, {price['provider']} {price['instance']} ({price['source']}, {price['date']})"
    )
