"""Tests of the load generator against a generation server that emits tokens at known times."""

from __future__ import annotations

from typing import Any

import loads
import numpy as np
import numpy.lib.recfunctions
import pytest
import token_server

from inferctl.bench.judge import streams, summary
from inferctl.bench.judge.summary_types import Summary
from inferctl.bench.load import records, target

LOAD = {"users": 4, "duration_s": 1, "warmup_s": 0, "generation": {"input_tokens": 32, "output_tokens": 9}}


def run(*options: str, **load: Any) -> tuple[Any, Summary, Any]:
    """Return the records of a load, its summary and the log of the server."""
    with token_server.run_server("--first-ms", "10", "--gap-ms", "3", *options) as server:
        _, part = loads.measure(server.url, task="generate", **{**LOAD, **load})
    return part, summary.summarize([part]), token_server.truth(server.log, loads.SERIAL)


@pytest.mark.parametrize(
    "options",
    [(), ("--tokens-per-event", "1,3"), ("--pairs",), ("--split",), ("--reasoning", "4")],
    ids=["one token per event", "several tokens per event", "two events per write", "split events", "reasoning"],
)
def test_every_event_of_the_server_is_recorded_once_with_its_tokens(options: tuple[str, ...]) -> None:
    part, found, truth = run(*options)
    assert found["errors"] == {}
    assert part.streams is not None
    events = part.events[part.events["phase"] == records.MEASURED]
    for index in part.measured["index"].tolist():
        assert events["tokens"][events["index"] == index].tolist() == [tokens for _, tokens in truth[index]]
    assert found["finish"] == {"length": found["requests"]}
    assert (found["output_tokens_per_request"], found["counted_percent"]) == (9, 100)
    assert found["ttft_ms"]["n"] == found["requests"]
    assert found["itl_ms"]["n"] == sum(len(truth[index]) - 1 for index in part.measured["index"].tolist())
    assert "--pairs" not in options or found["itl_ms"]["min"] == 0, "two events of one read have one time"


@pytest.mark.parametrize(
    "load", [{}, {"workers": 2}, {"mode": "open", "rate": 40.0, "warmup_s": 1}], ids=["closed", "two workers", "open"]
)
def test_the_load_goes_on_until_the_measured_streams_have_ended(load: dict[str, Any]) -> None:
    generation = {"input_tokens": 32, "output_tokens": 60}
    with token_server.run_server("--first-ms", "10", "--gap-ms", "8", "--sigma", "0.6") as server:
        _, part = loads.measure(server.url, task="generate", **{**LOAD, "generation": generation, **load})
    measured, after = (token_server.truth(server.log, loads.SERIAL + number) for number in (0, 2))
    assert after
    found = summary.summarize([part])
    assert set(part.rows["phase"].tolist()) <= {records.WARMUP, records.MEASURED}
    assert sorted(part.measured["index"].tolist()) == sorted(measured)
    assert (found["errors"], found["itl_ms"]["n"]) == ({}, 59 * len(measured))


def test_without_usage_in_each_event_an_event_counts_as_one_token() -> None:
    _, found, _ = run("--usage", "final", "--tokens-per-event", "3")
    assert (found["counted_percent"], found["output_tokens_per_request"], found["tokens_per_event"]) == (0, 9, 3)
    _, none, _ = run("--usage", "none", "--tokens-per-event", "3")
    assert (none["output_tokens_per_request"], none["cached_percent"]) == (3, None)


def test_usage_with_the_finish_reason_does_not_count_the_tokens_twice() -> None:
    part, found, truth = run("--usage", "finish", "--cached-tokens", "-1")
    assert part.streams is not None
    events = part.events[part.events["phase"] == records.MEASURED]
    for index in part.measured["index"].tolist():
        assert events["tokens"][events["index"] == index].tolist() == [tokens for _, tokens in truth[index]] == [1] * 9
    assert (found["counted_percent"], found["output_tokens_per_request"], found["tokens_per_event"]) == (0, 9, 1)
    assert (found["cached_percent"], found["tokens_per_request"] is None) == (None, False)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("error", "error event"),
        ("silent", "unfinished stream"),
        ("unfinished", "unfinished stream"),
        ("reset", "connection"),
    ],
)
def test_a_stream_that_does_not_end_properly_is_a_failure(fault: str, kind: str) -> None:
    part, found, _ = run("--fault", fault, "--fault-share", "0.5", "--fault-after", "3", "--seed", "2", users=2)
    failed = found["errors"].pop(kind)
    assert found["errors"] == {}
    assert 0 < failed < found["requests"]
    assert found["ttft_ms"]["n"] == found["requests"] - failed
    assert part.events is not None
    bad = part.measured["index"][part.measured["error"] != records.OK]
    assert np.isin(bad, part.events["index"][part.events["phase"] == records.MEASURED]).all()


def test_goodput_counts_requests_within_both_bounds() -> None:
    generation = {"input_tokens": 32, "output_tokens": 9}
    _, wide, _ = run(generation={**generation, "ttft_ms": 60_000, "itl_ms": 60_000})
    assert wide["goodput"] is not None
    assert (wide["goodput"]["percent"], wide["goodput"]["requests_per_s"]) == (100, wide["requests_per_s"])
    assert wide["goodput"]["output_tokens_per_s"] == wide["output_tokens_per_s"]
    # Not a bound of the gaps: on a busy machine, the tokens of a response can arrive together.
    _, narrow, _ = run(generation={**generation, "ttft_ms": 0.001, "itl_ms": 60_000})
    assert narrow["goodput"] is not None
    assert (narrow["goodput"]["percent"], narrow["goodput"]["requests_per_s"]) == (0, 0)


def test_the_form_of_the_requests_follows_what_the_server_accepts() -> None:
    with token_server.run_server() as server:
        full = target.connect(server.url)
        assert (full.task, full.path) == ("generate", "/v1/chat/completions")
        assert full.info["api"]["ignore_eos"]
        assert target.connect(f"{server.url}/v1/completions").body(["", "text"], 3)["prompt"] == "text"
    with token_server.run_server("--strict") as server:
        strict = target.connect(server.url)
    assert {"ignore_eos", "min_tokens"}.isdisjoint(strict.body(["a", "b"], 3))
    assert strict.body(["a", "b"], 3)["stream_options"] == {"include_usage": True}


CHUNK = '{"choices": [{"index": 0, "delta": {"content": "a\u2028b\x85"}, "finish_reason": null}]}'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_parts_of_a_stream_may_be_split_anywhere(size: int) -> None:
    from inferctl.bench.loadgen.recorder import OK
    from inferctl.bench.loadgen.stream import TokenStream

    events: list[tuple[int, ...]] = []
    stream = TokenStream(lambda *event: events.append(event), 7, 1)
    end = '{"choices": [{"delta": {}, "finish_reason": "stop"}]}'
    two_lines = CHUNK.replace(", ", ",\ndata: ", 1)
    text = f": ping\r\n\r\ndata: {CHUNK}\r\n\r\nevent: x\ndata:{CHUNK}\n\n"
    text += f"data: {two_lines}\n\ndata: {end}\n\ndata: [DONE]\n\n"
    content = text.encode()
    for at in range(0, len(content), size):
        stream.feed(content[at : at + size], at)
    assert [event[1:] for event in events] == [(7, 1, 1)] * 3
    assert (stream.done, stream.outcome(OK)) == (True, OK)


def test_a_request_without_a_second_event_has_no_time_per_output_token() -> None:
    rows = np.zeros(
        2, [(name, "<u8") for name in ("intended_ns", "end_ns", "index", "phase", "error", "output_tokens")]
    )
    rows = np.lib.recfunctions.append_fields(rows, "counted", [1, 1], usemask=False)
    rows["index"], rows["output_tokens"] = (0, 1), (1, 5)
    events = np.array(
        [(10_000_000, 0, 1, 0), (20_000_000, 1, 2, 0), (80_000_000, 1, 3, 0)],
        [("time_ns", "<u8"), ("index", "<u4"), ("tokens", "<u2"), ("phase", "<u1")],
    )
    found = streams.Streams(rows, events)
    assert found.ttft_ms.tolist() == [10, 20]
    # 60 ms for the three tokens after the first event.
    assert found.tpot_ms.tolist()[1] == 20
    assert np.isnan(found.tpot_ms[0])
    assert found.worst_gap_ms.tolist() == [0, 60]
    assert found.bounds_percent({"ttft": 20, "itl": 30}).tolist() == [50, 200]


def test_responses_that_end_early_are_counted() -> None:
    _, found, _ = run("--strict", "--eos-after", "4")
    assert (found["finish"], found["output_tokens_per_request"]) == ({"stop": found["requests"]}, 4)
