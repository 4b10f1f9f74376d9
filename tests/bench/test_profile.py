"""The profile of an engine: parts that add up to the time of all cores, in the terminal and in a drawing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_samples import document, sealed
from rich.console import Console

from inferctl.bench.measure import profile
from inferctl.bench.report import load_charts, terminal
from inferctl.bench.report.chart import PARTS
from inferctl.bench.report.rows import MeasuredRow
from inferctl.models import reference_process


def event(name: str, start: float, end: float, own: float = 0.0, thread: int = 1, shapes: Any = ()) -> Any:
    """Return an event of torch's profiler; times in seconds."""
    span = SimpleNamespace(start=1e6 * start, end=1e6 * end)
    return SimpleNamespace(
        name=name, time_range=span, self_cpu_time_total=1e6 * own, thread=thread, input_shapes=list(shapes)
    )


LAYERS = [
    event("inferctl layers", 1, 8),
    event("aten::embedding", 1, 1.5, 0.5),
    event("aten::linear", 2, 4.5, 0.5),
    event("mkldnn::_linear_pointwise", 2, 4, 2, shapes=[[1, 16, 8], [8, 8], [8]]),
    event("aten::addmm", 4.5, 5, 0.5, shapes=[[8], [16, 8], [8, 8]]),
    event("aten::bmm", 5, 6, 1),
    event("aten::gelu", 6, 6.5, 0.5),
]
WHOLE = [event("inferctl forward 1", 0, 9), event("aten::arange", 0, 0.5, 0.5), event("aten::amax", 8, 9, 1)]


@pytest.mark.parametrize(
    ("events", "core_seconds", "expected"),
    [
        (
            WHOLE + LAYERS,
            20,
            {"preparation": 1, "embedding and outputs": 1.5, "attention": 1, "norms and elementwise": 1, "Python": 2}
            | {"matrix products": 1.875, "padding": 0.625, "waiting": 11},
        ),
        # Two threads of a library compute one forward pass: each part counts twice.
        ([event("inferctl forward 2", 0, 9), *WHOLE[1:]], 18, {"embedding and outputs": 18}),
        ([event("inferctl forward 1", 0, 4, thread=2), *WHOLE], 18, {"embedding and outputs": 13, "waiting": 5}),
    ],
)
def test_the_parts_add_up_to_the_time_of_all_cores(
    events: list[Any], core_seconds: float, expected: dict[str, float]
) -> None:
    from inferctl.serve.engines.profile import account

    parts = account(events, core_seconds, tokens=12)
    assert {name: value for name, value in parts.items() if value} == pytest.approx(expected)
    assert sum(parts.values()) == pytest.approx(core_seconds)


def test_the_profile_of_the_real_model_is_drawn(minilm: Path, tmp_path: Path) -> None:
    wanted = {"engine": {"precision": "bf16"}, "words": "some words " * 500, "grid": [(1, 16), (20, 64)]}
    found = reference_process.run(
        minilm, {**wanted, "texts": ["short", "a longer text"]}, (), lambda _: None, profile.PROGRAM
    )
    assert [point["texts"] for point in found["points"]] == [1, 20, 2]
    for point in found["points"]:
        assert sum(point["parts"].values()) == pytest.approx(100, abs=0.1)
        assert set(point["parts"]) <= set(PARTS)
        assert all(point["parts"][part] > 0 for part in ("matrix products", "attention", "tokenization", "Python"))
        assert 0 < point["matrix_share_percent"] <= point["cpu_share_percent"] * 1.1
    (receipt,) = sealed(tmp_path, document("bf16", 10, 5) | {"profile": found})
    chart = load_charts.profile(receipt)
    assert [sum(column) for column in zip(*(trace["x"] for trace in chart.data), strict=True)] == pytest.approx(
        [100, 100, 100], abs=0.1
    )
    console = Console(width=80, record=True)
    console.print(terminal.profiles([MeasuredRow("bf16", "measured", profile=found)]))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(lines[1].split()) == len(lines[2].split()) == len(PARTS) + 3
