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
    assert lines[0] == "build"
    cached = [" ".join(line.split()[:2]) for line in lines if line.endswith("CACHED")]
    assert cached == ["[deps 2/2]", "[stage-1 2/3]", "[stage-1 3/3]"]
    assert not any("load .dockerignore" in line or "load metadata" in line for line in lines)

    # A repeated build for an export shows only new steps.
    lines = shown([Phase("push", "r/x:1"), *recorded("cached.txt")], capsys)
    assert not any(line.endswith("CACHED") for line in lines)
    assert any("exporting to image" in line for line in lines)


def test_failed_steps_notes_and_retries_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [Retry(1, 4, 2.0, "EOF"), Note("said once"), *recorded("failed.txt")]
    first, second, *lines = shown(events, capsys)
    assert (first, second) == ("  attempt 1 of 4 failed, retry in 2 s: EOF", "  said once")
    assert [line.split()[0] for line in lines if line.endswith("FAILED")] == ["[2/2]"]


def test_names_of_steps_fit_a_line() -> None:
    name = (
        "[torch 1/1] RUN --mount=type=cache,target=/root/.cache/pip \\\n   --mount=type=secret,id=ca pip install "
        + "x" * 200
    )
    assert short(name).startswith("[torch 1/1] RUN \\ pip install xxx")
    assert len(short(name)) == 60
    assert len(short(name, 20)) == 20
    prepared = (
        "[torch 1/1] RUN if [ -s /x ]; then export PIP_CERT=/x; fi; env -u PIP_CONSTRAINT python -m pip install a"
    )
    assert short(prepared) == "[torch 1/1] RUN python -m pip install a"
    assert short("[s 1/2] COPY --link --from=torch /layer /") == "[s 1/2] COPY --from=torch /layer /"


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_every_line_of_a_build_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown([Phase("build"), *recorded("cached.txt"), *recorded("failed.txt")], capsys)
    assert max(map(len, lines)) <= columns
