"""Capacity from a receipt, and a server that reads it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.batching.latency_model import Capacity
from inferctl.core.errors import InvalidRunError, NotEnoughEvidenceError, UsageError
from inferctl.receipts import capacity, receipt
from tests.bench.bench_samples import SHORT_PLAN, document, sealed
from tests.processes import ServerProcess, inferctl, start

FOUND = {"slo_p99_ms": 100.0, "max_goodput_rps": 84.0, "first_failing_rps": 88.0, "limited_by": "p99"}


def written(folder: Path, *paces: dict[str, Any] | None, **changes: Any) -> receipt.Receipt:
    runs = [{"repeat": number, "pace": pace, "records": []} for number, pace in enumerate(paces)]
    (made,) = sealed(folder, document("bf16", 50, 8, runs=runs, **changes))
    return receipt.load(made.path)


def test_the_capacity_is_the_middle_pace_with_what_the_search_found(tmp_path: Path) -> None:
    paces = [{"fixed_s": 0.001 * n, "tokens_per_s": 10_000.0} for n in (9, 1, 5)]
    made = written(tmp_path, *paces, search=FOUND)
    found = capacity.capacity(made)
    assert (found["fixed_s"], found["tokens_per_s"]) == (0.005, 10_000.0)
    assert {key: found[key] for key in FOUND} == FOUND
    assert found["receipt_seal"] == made.data["seal"]
    assert (found["model_sha256"], found["precision"], found["hardware"]) == ("ef" * 32, "bf16", "cpu")
    assert capacity.sentence(found) == (
        "a batch takes 5.0 ms plus 1 s per 10,000 tokens; the server meets p99 100 ms up to 84 requests/s"
    )


def test_how_many_batches_ran_at_a_time_is_kept_since_the_pace_is_that_of_each(tmp_path: Path) -> None:
    pace = {"fixed_s": 0.001, "tokens_per_s": 10_000.0}
    server = {"parallel_batches": 2, "limits": {"max_batch_tokens": 2048}}
    found = capacity.capacity(written(tmp_path, pace, server=server))
    assert (found["parallel_batches"], found["max_batch_tokens"]) == (2, 2048)
    assert capacity.capacity(written(tmp_path, pace))["parallel_batches"] == 1


def test_the_slo_is_the_searchs_then_the_receipts_then_nobodys(tmp_path: Path) -> None:
    pace = {"fixed_s": 0.001, "tokens_per_s": 10_000.0}
    assert capacity.capacity(written(tmp_path, pace))["slo_p99_ms"] is None
    assert capacity.capacity(written(tmp_path, pace), 50)["slo_p99_ms"] == 50
    assert capacity.capacity(written(tmp_path, pace, slo={"p99_ms": 70}))["slo_p99_ms"] == 70
    with pytest.raises(UsageError, match="was for p99 100 ms, not 50 ms"):
        capacity.capacity(written(tmp_path, pace, search=FOUND), 50)


def test_no_capacity_comes_from_an_invalid_run_or_from_a_server_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughEvidenceError, match="no `pace`"):
        capacity.capacity(written(tmp_path, None, {"fixed_s": 0.0, "tokens_per_s": None}))
    bad = {"valid": False, "reasons": ["3 of 9 requests failed"], "cautions": []}
    with pytest.raises(InvalidRunError, match="3 of 9 requests failed"):
        capacity.capacity(written(tmp_path, {"fixed_s": 0.001, "tokens_per_s": 1.0}, validity=bad))


def generation(folder: Path, **changes: Any) -> receipt.Receipt:
    """Return a receipt of generation: prompts of 512 tokens, answers of 128."""
    summary = {"requests_per_s": 9.0, "tokens_per_request": 512.0, "output_tokens_per_request": 128.0}
    plan = {"name": "search", "load": {"task": "generate", "mode": "open"}}
    return written(folder, None, plan=plan, **{"summary": summary, "search": FOUND, **changes})


def test_the_rate_of_a_search_is_within_the_slo_for_every_task(tmp_path: Path) -> None:
    embed = written(tmp_path, None, search=FOUND)
    found = capacity.served_rate(embed)
    # 84 requests/s x 10 tokens
    assert (found.requests_per_s, found.tokens_per_s, found.within_slo) == (84.0, 840.0, True)
    # 84 requests/s x (512 + 128) tokens, without a batch latency model
    assert capacity.served_rate(generation(tmp_path)).tokens_per_s == 53_760


def test_generation_still_has_no_capacity_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["capacity", str(generation(tmp_path).path)]) == 2
    assert "`inferctl deploy` reads the rate of a search" in capsys.readouterr().err


def test_a_closed_loop_shows_a_rate_without_an_slo_and_an_open_loop_none(tmp_path: Path) -> None:
    closed = written(tmp_path, None, plan={"load": {"mode": "closed"}})
    found = capacity.served_rate(closed)
    measured = closed.data["summary"]["requests_per_s"]
    assert measured == pytest.approx(50, rel=0.01)
    assert (found.requests_per_s, found.tokens_per_request, found.within_slo) == (measured, 10.0, False)
    with pytest.raises(NotEnoughEvidenceError, match="open loop without a search"):
        capacity.served_rate(written(tmp_path, None, plan={"load": {"mode": "open"}}))


def test_no_rate_comes_from_a_search_without_a_result(tmp_path: Path) -> None:
    none = FOUND | {"max_goodput_rps": None, "reason": "all rates are above the SLO"}
    with pytest.raises(NotEnoughEvidenceError, match="all rates are above the SLO"):
        capacity.served_rate(written(tmp_path, None, search=none))
    without_answers = generation(tmp_path, summary={"requests_per_s": 9.0, "tokens_per_request": 512.0})
    with pytest.raises(NotEnoughEvidenceError, match="no tokens per request"):
        capacity.served_rate(without_answers)


@pytest.mark.slow
def test_a_server_admits_by_the_capacity_that_was_measured(minilm: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as servers:

        def serve(*options: str) -> ServerProcess:
            started = start(tmp_path, "--model", str(minilm), "--engine", "echo", *options)
            servers.callback(started.kill)
            return started

        server = serve()
        assert server.get("/info").json()["pace"]["tokens_per_s"] is None
        load = ("--plan", SHORT_PLAN, "--slo", "80", "--users", "64", "--duration", "3")
        line = ("bench", "--url", f"echo={server.url}", *load, "--json")
        document = json.loads(inferctl(*line, cwd=tmp_path, code=0, timeout=None).stdout)
        (row,) = document["rows"]
        resources = receipt.load(Path(row["receipt"])).data["resources"]
        # Nothing takes as little time as this engine.
        assert resources["engine_busy_percent"] < resources["api_busy_percent"]
        assert any(
            "front end limited the server: the event loop of the API process had" in text for text in row["cautions"]
        )
        server.stop()
        measured = document["rows"][0]["receipt"]
        made = inferctl("capacity", measured, "-o", "capacity.json", cwd=tmp_path, code=0).stdout.strip()
        found = Capacity.read(tmp_path / made)
        assert found.tokens_per_s > 0
        info = serve("--capacity", "capacity.json").get("/info").json()
    pace = info["pace"]
    assert info["limits"]["slo_p99_ms"] == 80
    assert pace["fixed_s"] == pytest.approx(found.fixed_s, abs=1e-6)
    assert pace["tokens_per_s"] == pytest.approx(found.tokens_per_s, rel=1e-3)
