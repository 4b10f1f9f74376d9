"""The rate of one replica, from a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import InvalidRunError, NotEnoughEvidenceError
from inferctl.receipts import capacity, receipt
from tests.bench.bench_samples import document, sealed

FOUND = {"slo_p99_ms": 100.0, "max_goodput_rps": 84.0, "first_failing_rps": 88.0, "limited_by": "p99"}


def written(folder: Path, **changes: Any) -> receipt.Receipt:
    (made,) = sealed(folder, document("bf16", 50, 8, runs=[{"repeat": 0, "records": []}], **changes))
    return receipt.load(made.path)


def generation(folder: Path, **changes: Any) -> receipt.Receipt:
    """Return a receipt of generation: prompts of 512 tokens, answers of 128."""
    summary = {"requests_per_s": 9.0, "tokens_per_request": 512.0, "output_tokens_per_request": 128.0}
    plan = {"name": "search", "load": {"task": "generate", "mode": "open"}}
    return written(folder, plan=plan, **{"summary": summary, "search": FOUND, **changes})


def test_the_rate_of_a_search_is_within_the_slo_for_every_task(tmp_path: Path) -> None:
    embed = written(tmp_path, search=FOUND)
    found = capacity.served_rate(embed)
    # 84 requests/s x 10 tokens
    assert (found.requests_per_s, found.tokens_per_s, found.within_slo) == (84.0, 840.0, True)
    # 84 requests/s x (512 + 128) tokens, without a batch latency model
    assert capacity.served_rate(generation(tmp_path)).tokens_per_s == 53_760


def test_a_closed_loop_shows_a_rate_without_an_slo_and_an_open_loop_none(tmp_path: Path) -> None:
    closed = written(tmp_path, plan={"load": {"mode": "closed"}})
    found = capacity.served_rate(closed)
    measured = closed.data["summary"]["requests_per_s"]
    assert measured == pytest.approx(50, rel=0.01)
    assert (found.requests_per_s, found.tokens_per_request, found.within_slo) == (measured, 10.0, False)
    with pytest.raises(NotEnoughEvidenceError, match="open loop without a search"):
        capacity.served_rate(written(tmp_path, plan={"load": {"mode": "open"}}))


def test_no_rate_comes_from_a_search_without_a_result(tmp_path: Path) -> None:
    none = FOUND | {"max_goodput_rps": None, "reason": "all rates are above the SLO"}
    with pytest.raises(NotEnoughEvidenceError, match="all rates are above the SLO"):
        capacity.served_rate(written(tmp_path, search=none))
    without_answers = generation(tmp_path, summary={"requests_per_s": 9.0, "tokens_per_request": 512.0})
    with pytest.raises(NotEnoughEvidenceError, match="no tokens per request"):
        capacity.served_rate(without_answers)


def test_no_rate_comes_from_an_invalid_run(tmp_path: Path) -> None:
    bad = {"valid": False, "reasons": ["3 of 9 requests failed"], "cautions": []}
    with pytest.raises(InvalidRunError, match="3 of 9 requests failed"):
        capacity.served_rate(written(tmp_path, search=FOUND, validity=bad))
