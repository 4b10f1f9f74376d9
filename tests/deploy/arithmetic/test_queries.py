"""The expressions by which flavors are scaled, evaluated by Prometheus' own `promtool test rules`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from inferctl.deploy import queries
from inferctl.deploy.plan import DeploymentPlan
from tests.deploy.arithmetic.sources import HALF, IMAGE, plan, spec
from tests.processes import execute

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool not found: install prometheus")

PODS = 'namespace="inference",service="embed"'
OFFERED = f'inferctl_offered_tokens_total{{{PODS},basis="counted",pod="p1",inferctl_io_flavor="a100-half"}}'
REFUSED = f'inferctl_offered_tokens_total{{{PODS},basis="estimated",pod="p2",inferctl_io_flavor="l4"}}'
QUEUE = f'inferctl_queue_tokens{{{PODS},basis="counted",pod="p1"}}'
OTHER = 'inferctl_offered_tokens_total{namespace="inference",service="another",basis="counted",pod="x"}'


def model(**slo: float) -> DeploymentPlan:
    """Return a model with two flavors: at most 2 x 100,000 tokens/s, then at most 4 x 50,000."""
    deploy = {
        "flavors": [
            {"hardware": HALF, "name": "a100-half", "tokens_per_second": 100_000, "max_replicas": 2, "image": IMAGE},
            {"hardware": "l4", "tokens_per_second": 50_000, "max_replicas": 4, "image": IMAGE},
        ],
        "traffic": {"base_rps": 10, "peak_rps": 100, "tokens_per_request": 250},
        "cold_start_s": 120,
    }
    return plan(spec(deploy, slo=slo))


def found(made: DeploymentPlan, flavor: int) -> dict[str, str]:
    (model,), (cluster,) = made.models, made.clusters
    found = queries.of(model, model.flavors[: flavor + 1], cluster, "inference")
    return {query.name: query.promql for query in found}


def evaluate(folder: Path, query: str, series: dict[str, str], at: str = "10m") -> float:
    """Return the value of a query over series in promtool's notation, one value every 15 s."""
    (folder / "rules.yaml").write_text(json.dumps({"groups": []}))
    test: dict[str, Any] = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        # An expected value that cannot be right, so that promtool prints the real one.
        "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": -1}]}],
    }
    file = folder / "test.yaml"
    file.write_text(json.dumps({"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": [test]}))
    done = execute("promtool", "test", "rules", file)
    text = done.stdout + done.stderr
    got = text.partition("got:")[2]
    assert "got:" in text, text
    values = [line.split()[-1] for line in got.splitlines() if line.strip() and "{}" in line]
    assert len(values) == 1, text
    return float(values[0])


def rising(per_second: float) -> str:
    return f"0+{per_second * 15:g}x60"


def test_the_offered_rate_counts_refused_tokens_and_not_those_of_other_models(tmp_path: Path) -> None:
    query = found(model(), 0)["offered"]
    series = {OFFERED: rising(80_000), REFUSED: rising(60_000), OTHER: rising(500_000)}
    # (80,000 + 60,000) / (0.7 x 100,000) = 2
    assert evaluate(tmp_path, query, series) == pytest.approx(2.0)


def test_the_next_flavor_gets_what_the_first_at_its_maximum_leaves(tmp_path: Path) -> None:
    query = found(model(), 1)["offered"]
    # 2 x 0.7 x 100,000 = 140,000 are served before; (210,000 - 140,000) / (0.7 x 50,000) = 2
    assert evaluate(tmp_path, query, {OFFERED: rising(210_000)}) == pytest.approx(2.0)
    assert evaluate(tmp_path, query, {OFFERED: rising(100_000)}) == 0


UNAVAILABLE = 'kube_deployment_status_replicas_unavailable{namespace="inference",deployment="embed-a100-half"}'
AVAILABLE = 'kube_deployment_status_replicas_available{namespace="inference",deployment="embed-a100-half"}'


def test_hardware_that_ran_out_does_not_count_at_its_maximum(tmp_path: Path) -> None:
    query = found(model(), 1)["offered"]
    series = {OFFERED: rising(210_000), AVAILABLE: "1x60", UNAVAILABLE: "1x60"}
    # One of two is available for longer than a cold start: (210,000 - 70,000) / 35,000 = 4
    assert evaluate(tmp_path, query, series) == pytest.approx(4.0)
    # Its pod is missing only for a minute, so it is still starting. 36 x 15 s = 9 min.
    assert evaluate(tmp_path, query, {**series, UNAVAILABLE: "0x36 1x24"}) == pytest.approx(2.0)
    assert evaluate(tmp_path, query, {**series, UNAVAILABLE: "0x60"}) == pytest.approx(2.0)


def test_the_backlog_is_in_seconds_of_work(tmp_path: Path) -> None:
    # 150,000 tokens are 1.5 s of work of one replica; 1 s is tolerated.
    assert evaluate(tmp_path, found(model(), 0)["backlog"], {QUEUE: "150000x60"}) == pytest.approx(1.5)
    # The first flavor computes 2 x 100,000 of it in 1 s; (275,000 - 200,000) / 50,000 = 1.5
    assert evaluate(tmp_path, found(model(), 1)["backlog"], {QUEUE: "275000x60"}) == pytest.approx(1.5)
    assert evaluate(tmp_path, found(model(), 1)["backlog"], {QUEUE: "150000x60"}) == 0


def latencies(flavor: str, fast: float, slow: float) -> dict[str, str]:
    """Return a histogram with `fast` requests/s of at most 0.1 s and `slow` of 0.1 to 0.5 s."""
    own = f'{PODS},inferctl_io_flavor="{flavor}",priority="interactive",endpoint="/v1/embeddings"'
    name = "inferctl_request_duration_seconds_bucket"
    return {
        f'{name}{{{own},le="0.1"}}': rising(fast),
        f'{name}{{{own},le="0.5"}}': rising(fast + slow),
        f'{name}{{{own},le="+Inf"}}': rising(fast + slow),
        f'inferctl_model_info{{{PODS},inferctl_io_flavor="{flavor}",pod="{flavor}-1"}}': "1x60",
        f'inferctl_model_info{{{PODS},inferctl_io_flavor="{flavor}",pod="{flavor}-2"}}': "1x60",
        f'inferctl_model_info{{{PODS},inferctl_io_flavor="{flavor}",pod="{flavor}-3"}}': "1x60",
    }


def test_a_p99_over_the_slo_asks_for_more_replicas_of_its_own_flavor(tmp_path: Path) -> None:
    made = model(p99_ms=300)
    query = found(made, 0)["p99"]
    # 1.5% of the requests lie between 0.1 and 0.5 s, so the p99 is after a third of them, 0.23 s: within the SLO.
    assert evaluate(tmp_path, query, latencies("a100-half", 98.5, 1.5)) == 0
    # Half of them: p99 = 0.1 + 0.4 x 0.49 / 0.5 = 0.492 s, 1.64 x the SLO, with 3 pods: 4.92
    assert evaluate(tmp_path, query, latencies("a100-half", 50, 50)) == pytest.approx(4.92)
    assert evaluate(tmp_path, query, latencies("l4", 50, 50)) == 0
    # At most twice as many: an SLO of 100 ms is exceeded 4.92 times.
    assert evaluate(tmp_path, found(model(p99_ms=100), 0)["p99"], latencies("a100-half", 50, 50)) == 6


def test_without_requests_or_pods_the_p99_asks_for_nothing(tmp_path: Path) -> None:
    query = found(model(p99_ms=300), 0)["p99"]
    assert evaluate(tmp_path, query, latencies("a100-half", 0, 0)) == 0
    assert evaluate(tmp_path, query, {OTHER: "1x60"}) == 0


def test_without_an_slo_there_are_two_queries_and_never_the_backlog_alone() -> None:
    assert list(found(model(), 0)) == ["offered", "backlog"]
    assert list(found(model(p99_ms=100), 0)) == ["offered", "backlog", "p99"]


def test_no_metrics_are_no_value_so_that_the_fallback_applies(tmp_path: Path) -> None:
    """A zero would remove replicas at the peak while Prometheus is restarting."""
    with pytest.raises(AssertionError, match="nil"):
        evaluate(tmp_path, found(model(), 0)["offered"], {OTHER: "1x60"})
