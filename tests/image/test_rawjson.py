"""Tests parsing of recorded buildx output: with one object per line, and indented as buildx 0.13 writes them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from inferctl.image.events import BuildEvent, StepBytes, StepFinished, StepLog, StepStarted
from inferctl.image.rawjson import Reader

RECORDED = Path(__file__).parent / "recorded"


def read(lines: list[str]) -> tuple[list[BuildEvent], Reader]:
    reader = Reader()
    events = [event for line in lines for event in reader.feed(line)]
    return events + list(reader.finish()), reader


def recorded(name: str, style: str) -> list[str]:
    """Return the recorded lines, either unchanged or with indented JSON objects."""
    lines = (RECORDED / name).read_text().splitlines(keepends=True)
    if style == "one per line":
        return lines
    texts = (json.dumps(json.loads(line), indent=2) + "\n" if line.startswith("{") else line for line in lines)
    return "".join(texts).splitlines(keepends=True)


@pytest.mark.parametrize("style", ["indented", "one per line"])
def test_each_step_starts_and_ends_once_with_its_own_seconds_lines_and_bytes(style: str) -> None:
    events, _ = read(recorded("fresh.txt", style))
    started = [event.id for event in events if isinstance(event, StepStarted)]
    finished = [event.id for event in events if isinstance(event, StepFinished)]
    assert len(started) == len(set(started))
    assert sorted(started) == sorted(finished)
    run = next(e for e in events if isinstance(e, StepFinished) and "RUN --mount" in e.name)
    assert 0.3 <= run.seconds < 30, "without those of the look-up in the cache"
    assert (run.cached, run.error) == (False, None)
    # Whole lines, with progress bars at their last state.
    assert [e.text for e in events if isinstance(e, StepLog)] == ["one", "100%", "no newline"]
    context = next(e for e in events if isinstance(e, StepFinished) and e.name == "[internal] load build context")
    moved = [e.current for e in events if isinstance(e, StepBytes) and e.id == context.id]
    assert moved == sorted(moved)
    assert context.bytes == moved[-1] > 0


def test_a_log_line_in_two_chunks_is_one_event() -> None:
    def log(data: bytes) -> str:
        return json.dumps({"logs": [{"vertex": "sha256:1", "stream": 1, "data": base64.b64encode(data).decode()}]})

    events, _ = read([log(b"Downloading to"), log(b"rch\nnext\n")])
    assert [e.text for e in events if isinstance(e, StepLog)] == ["Downloading torch", "next"]


@pytest.mark.parametrize("style", ["indented", "one per line"])
def test_a_failure_keeps_the_plain_lines_and_the_log_of_the_step(style: str) -> None:
    events, reader = read(recorded("failed.txt", style))
    failed = [e for e in events if isinstance(e, StepFinished) and e.error]
    assert ["exit code: 7" in (e.error or "") for e in failed] == [True]
    assert reader.tail[-1].startswith("ERROR: failed to solve: process")
    assert any(">>> RUN echo collecting" in line for line in reader.tail)
    step = reader.failed_step()
    assert step is not None
    assert step[0].startswith("[2/2] RUN echo collecting")
    assert step[1] == ["collecting", "No space was wanted here"]


def test_steps_cancelled_by_another_failure_are_not_the_cause() -> None:
    def vertex(digest: str, error: str) -> dict[str, str]:
        times = {"started": "2026-01-01T00:00:00.5Z", "completed": "2026-01-01T00:00:02.123456789Z"}
        return {"digest": digest, "name": digest, **times, "error": error}

    first = json.dumps({"vertexes": [vertex("a", "process did not complete: context canceled")]})
    _, reader = read([first, json.dumps({"vertexes": [vertex("b", "exit code: 1")]})])
    assert reader.failed_step() == ("b", [])


@pytest.mark.parametrize(
    "line",
    ["{", '{"vertexes": [', '{"level":"warning","msg":"not progress"}', "{not json}", "[1, 2]"],
)
def test_lines_that_only_look_like_progress_are_plain_lines(line: str) -> None:
    _, reader = read([line, "ERROR: the end"])
    assert list(reader.tail) == [line, "ERROR: the end"]


def test_a_plain_line_inside_an_object_is_kept() -> None:
    events, reader = read(
        ["WARNING: before", '{"vertexes":[{"digest":"a","name":"x","started":"2026-01-01T00:00:00Z"}]}', "after"]
    )
    assert [e.name for e in events if isinstance(e, StepStarted)] == ["x"]
    assert list(reader.tail) == ["WARNING: before", "after"]
