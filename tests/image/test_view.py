"""Tests the output of events: one line per step on stderr, nothing on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferctl.cli.build_view import BuildView, short
from inferctl.image.events import Event, Note, Phase, Retry
from inferctl.image.rawjson import Reader

RECORDED = Path(__file__).parent / "recorded"


def shown(events: list[Event], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with BuildView(live=False) as view:
        for event in events:
            view.show(event)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def recorded(name: str) -> list[Event]:
    reader = Reader()
    lines = (RECORDED / name).read_text().splitlines()
    return [*(event for line in lines for event in reader.feed(line)), *reader.finish()]


def test_cached_steps_of_the_dockerfile_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([Phase("build"), *recorded("cached.txt")], capsys)
    cached = [" ".join(line.split()[:2]) for line in lines if line.endswith("CACHED")]
    assert (lines[0], cached) == ("build", ["[deps 2/2]", "[stage-1 2/3]", "[stage-1 3/3]"])
    assert not any("load .dockerignore" in line or "load metadata" in line for line in lines)


def test_a_failed_step_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(recorded("failed.txt"), capsys)
    assert [line.split()[0] for line in lines if line.endswith("FAILED")] == ["[2/2]"]


def test_a_repeated_build_for_an_export_shows_only_new_steps(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([Phase("push", "r/x:1"), *recorded("cached.txt")], capsys)
    assert not any(line.endswith("CACHED") for line in lines)
    assert any("exporting to image" in line for line in lines)


def test_notes_and_retries_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [Retry(1, 4, 2.0, "EOF"), Note("said once")]
    assert shown(events, capsys) == ["  attempt 1 of 4 failed, retry in 2 s: EOF", "  said once"]


@pytest.mark.parametrize(
    ("name", "start", "length"),
    [
        (
            "[a 1/1] RUN --mount=type=cache,target=/pip \\\n   --mount=type=secret,id=ca pip " + 99 * "x",
            "RUN \\ pip xxx",
            60,
        ),
        (
            "[a 1/1] RUN if [ -s /x ]; then export A=/x; fi; env -u B python -m pip install a",
            "RUN python -m pip install a",
            35,
        ),
        ("[a 1/1] COPY --link --from=torch /layer /", "COPY --from=torch /layer /", 34),
    ],
)
def test_names_of_steps_fit_a_line(name: str, start: str, length: int) -> None:
    assert short(name).startswith(f"[a 1/1] {start}")
    assert (len(short(name)), len(short(name, 20))) == (length, 20)


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_every_line_of_a_build_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown([Phase("build"), *recorded("cached.txt"), *recorded("failed.txt")], capsys)
    assert max(map(len, lines)) <= columns
