"""Each alert is fired by its fault and silent without it, as `promtool test rules` evaluates the rules."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inferctl.deploy.observe.alerts import groups, rules
from inferctl.deploy.observe.watched import Watched
from inferctl.manifests import metric_names
from inferctl.serve.observe.metrics import AT_CAPACITY
from tests.conftest import ROOT
from tests.deploy.watched_models import CHAT, EMBED, KNOWN_METRICS
from tests.processes import execute

MINUTES = 120
FAULT = 40  # minute at which most faults start
BEFORE, AFTER = 38, 118
Series = Callable[[int], float | None]


def gauge(value: float, then: float | None = None, at: int = FAULT) -> Series:
    """Return a gauge that changes at minute `at`."""
    return lambda minute: value if then is None or minute < at else then


def counter(per_minute: float, then: float | None = None, at: int = FAULT) -> Series:
    """Return a counter whose rate changes at minute `at`."""
    later = per_minute if then is None else then
    return lambda minute: per_minute * min(minute, at) + later * max(0, minute - at)


def lost(value: float, at: int = FAULT) -> Series:
    """Return a gauge without values from minute `at` on."""
    return lambda minute: value if minute < at else None


def histogram(name: str, labels: str, slow_share: float, slow: str, rate: float = 600) -> dict[str, Series]:
    """Return a histogram whose requests take under 0.05 s before the fault. Then a share needs up to `slow`."""
    bounds = ["0.05", "0.07", "0.1", "0.14", "+Inf"]
    found: dict[str, Series] = {}
    for bound in bounds:
        fast = bounds.index(bound) < bounds.index(slow)
        found[f'{name}_bucket{{{labels},le="{bound}"}}'] = counter(rate, rate * (1 - slow_share) if fast else rate)
    return found | {f"{name}_count{{{labels}}}": counter(rate)}


def healthy(watched: Watched) -> dict[str, Series]:
    """Return the series of a model without problems, also of another model in the same namespace that has all."""
    found: dict[str, Series] = {}
    for number, flavor in enumerate(watched.flavors):
        pod = f"{flavor.name}-7d9f8c6b5-bcdf{number + 4}"
        server = f'namespace="inference",service="{watched.name}",pod="{pod}"'
        found |= histogram(
            "inferctl_request_duration_seconds", f'{server},endpoint="embeddings",priority="interactive"', 0, "0.07"
        )
        found |= histogram("inferctl_phase_duration_seconds", f'{server},phase="first_token"', 0, "0.07")
        found |= {
            f'inferctl_requests_total{{{server},status="200"}}': counter(600),
            f'inferctl_requests_total{{{server},status="500"}}': counter(0),
            f'inferctl_rejected_total{{{server},reason="queue_full"}}': counter(0),
            f'inferctl_rejected_total{{{server},reason="rate_limit_exceeded"}}': counter(0),
            f'inferctl_slo_seconds{{{server},objective="request_p99"}}': gauge(0.07),
            f'inferctl_slo_seconds{{{server},objective="first_token"}}': gauge(0.07),
            f"inferctl_engine_up{{{server}}}": gauge(1),
            f"inferctl_engine_restarts{{{server}}}": gauge(0),
            f'inferctl_model_info{{{server},sha256="0123456789ab"}}': gauge(1),
            f'inferctl_queue_tokens{{{server},basis="counted"}}': gauge(20_000),
            f"inferctl_requests_waiting{{{server}}}": gauge(4),
            f"inferctl_requests_in_flight{{{server}}}": gauge(20),
            f'inferctl_capacity_tokens_per_second{{{server},source="fitted"}}': gauge(100_000),
            f"inferctl_tokens_total{{{server}}}": counter(60 * 70_000),
            f"inferctl_non_finite_total{{{server}}}": counter(0),
            f"inferctl_out_of_memory_total{{{server}}}": counter(0),
            f"inferctl_outbox_age_seconds{{{server}}}": gauge(2),
            f'inferctl_budgets_reached{{{server},percent="80"}}': gauge(0),
            f"inferctl_outbox_dropped_events{{{server}}}": gauge(0),
            f"vllm:num_preemptions_total{{{server}}}": counter(1),
        }
        found |= cluster(flavor.name, pod)
        if flavor.overflow:
            placeholders = f'namespace="inference",deployment="{flavor.overflow}"'
            found[f"kube_deployment_spec_replicas{{{placeholders}}}"] = gauge(1)
            found[f"kube_deployment_status_replicas_available{{{placeholders}}}"] = gauge(1)
    return found


def cluster(deployment: str, pod: str) -> dict[str, Series]:
    """Return what kube-state-metrics, KEDA and DCGM Exporter report about a flavor with one pod."""
    here, this = f'namespace="inference",deployment="{deployment}"', f'namespace="inference",pod="{pod}"'
    scaler = f'namespace="inference",horizontalpodautoscaler="keda-hpa-{deployment}"'
    return {
        f"kube_deployment_spec_replicas{{{here}}}": gauge(1),
        f"kube_deployment_status_replicas{{{here}}}": gauge(1),
        f"kube_deployment_status_replicas_available{{{here}}}": gauge(1),
        f'kube_pod_status_phase{{{this},phase="Pending"}}': gauge(0),
        f'kube_pod_status_phase{{{this},phase="Running"}}': gauge(1),
        f'kube_pod_status_ready{{{this},condition="true"}}': gauge(1),
        f'kube_pod_container_status_restarts_total{{{this},container="server"}}': counter(0),
        f"kube_horizontalpodautoscaler_status_desired_replicas{{{scaler}}}": gauge(1),
        f"kube_horizontalpodautoscaler_spec_max_replicas{{{scaler}}}": gauge(8),
        f"kube_horizontalpodautoscaler_spec_min_replicas{{{scaler}}}": gauge(1),
        f'kube_horizontalpodautoscaler_status_condition{{{scaler},condition="ScalingActive",status="false"}}': gauge(0),
        f'keda_scaler_detail_errors_total{{scaledObject="{deployment}"}}': counter(0),
        f'DCGM_FI_DEV_XID_ERRORS{{{this},gpu="0"}}': gauge(0),
    }


@dataclass(frozen=True)
class Case:
    """A fault: parts of the names of series -> what they do instead. `fires`: exactly these alerts.

    The first series with all parts changes, or each with `everywhere`.
    """

    name: str
    fires: frozenset[str]
    changed: Mapping[tuple[str, ...], Series]
    added: Mapping[str, Series] = field(default_factory=dict)
    everywhere: bool = True
    watched: Watched = EMBED


def fault(name: str, alert: str, *changed: tuple[str | tuple[str, ...], Series], **options: Any) -> Case:
    """Return a case in which the alerts named in `alert` fire; with an empty text none."""
    parts = {(each,) if isinstance(each, str) else each: series for each, series in changed}
    return Case(name, frozenset(f"Inferctl{each}" for each in alert.split()), parts, **options)


P99 = "inferctl_request_duration_seconds"
FIRST = "inferctl_phase_duration_seconds"
DESIRED = "kube_horizontalpodautoscaler_status_desired_replicas"
INACTIVE = "kube_horizontalpodautoscaler_status_condition"
AVAILABLE = "kube_deployment_status_replicas_available"
OVERFLOW = '_replicas_available{namespace="inference",deployment="embed-a100-half-overflow"'
HALF_POD = 'namespace="inference",pod="embed-a100-half-7d9f8c6b5-bcdf4"'
KILLED = f'kube_pod_container_status_last_terminated_reason{{{HALF_POD},container="server",reason="OOMKilled"}}'
LAST = AFTER - 4  # an event shortly before the rules are read


def slow(share: float, to: str, name: str = P99, rate: float = 600) -> list[tuple[tuple[str, ...], Series]]:
    found = histogram(name, "", share, to, rate)
    return [((name, f'le="{key.split(chr(34))[1]}"' if "le=" in key else "_count"), s) for key, s in found.items()]


CASES = [
    fault("nothing", ""),
    fault("2% over the SLO", "LatencyAboveSlo", *slow(0.02, "0.1")),
    fault("1% over the SLO is within it", "", *slow(0.0099, "0.1")),
    fault("all requests just within the SLO", "", *slow(1.0, "0.07")),
    fault("far over the SLO, above all bounds", "LatencyAboveSlo", *slow(0.5, "+Inf")),
    fault("few slow requests", "", *slow(0.5, "0.1", rate=4)),
    fault(
        "slow bulk requests have no SLO",
        "",
        added={
            k.replace("interactive", "bulk"): s
            for k, s in histogram(
                P99, 'namespace="inference",service="embed",pod="a",endpoint="embeddings",priority="bulk"', 1, "+Inf"
            ).items()
        },
    ),
    fault("rejected for capacity", "Rejected", ('reason="queue_full"', counter(0, 12))),
    fault("few rejections", "", ('reason="queue_full"', counter(0, 5))),
    fault("limits of keys", "KeyLimitReached", ('reason="rate_limit_exceeded"', counter(0, 60))),
    fault("few over their limit", "", ('reason="rate_limit_exceeded"', counter(0, 20))),
    fault("a budget", "BudgetReached", ('percent="80"', gauge(0, 1))),
    fault("errors", "ServerErrors", ('status="500"', counter(0, 12))),
    fault("few errors", "", ('status="500"', counter(0, 5))),
    fault("one replica is not scraped", "MetricsMissing", ("inferctl_engine_up", lost(1)), everywhere=False),
    fault("no replica is scraped", "MetricsMissing", ("inferctl_engine_up", lost(1))),
    fault(
        "another model",
        "ModelsDiffer",
        added={
            'inferctl_model_info{namespace="inference",service="embed",'
            'pod="embed-l4-1-x",sha256="fedcba987654"}': lambda m: 1 if m >= FAULT else None
        },
    ),
    fault(
        "a rollout of another model",
        "",
        added={
            'inferctl_model_info{namespace="inference",service="embed",'
            'pod="embed-l4-1-x",sha256="fedcba987654"}': lambda m: 1 if m >= AFTER - 50 else None
        },
    ),
    fault("one restart of an engine", "EngineRestarted", ("inferctl_engine_restarts", gauge(0, 1, LAST))),
    fault("an old restart", "", ("inferctl_engine_restarts", gauge(0, 1))),
    fault(
        "an engine that crashes again and again",
        "EngineRestarted EngineCrashLoop",
        ("inferctl_engine_restarts", lambda m: max(0, (m - FAULT) // 3)),
    ),
    fault("one restart of a container", "", ("status_restarts_total", gauge(0, 1, LAST))),
    fault(
        "a container that crashes", "ContainerCrashLoop", ("status_restarts_total", lambda m: max(0, m - FAULT) // 5)
    ),
    fault(
        "a container killed for memory",
        "ContainerOutOfMemory",
        ("status_restarts_total", gauge(0, 1, LAST)),
        added={KILLED: lambda m: 1 if m >= LAST else None},
    ),
    fault(
        "killed for memory long ago",
        "",
        ("status_restarts_total", gauge(0, 1)),
        added={KILLED: lambda m: 1 if m >= FAULT else None},
    ),
    fault(
        "no replica",
        "NoReplica",
        ((AVAILABLE, 'deployment="embed-a100-half"'), gauge(1, 0)),
        ((AVAILABLE, 'deployment="embed-l4"'), gauge(1, 0)),
    ),
    fault("one flavor without a replica", "", ((AVAILABLE, 'deployment="embed-l4"'), gauge(1, 0))),
    fault("quota used up", "PodsNotCreated", (("spec_replicas", "embed-l4"), gauge(1, 3))),
    fault(
        "GPUs run out",
        "PodPending",
        (('phase="Pending"', "embed-l4"), gauge(0, 1)),
        (('phase="Running"', "embed-l4"), gauge(1, 0)),
        (("status_ready", "embed-l4"), gauge(1, 0)),
    ),
    fault(
        "a cold start",
        "",
        (('phase="Pending"', "embed-l4"), lambda m: 1 if FAULT <= m % 60 < FAULT + 4 else 0),
    ),
    fault("a pod that is never ready", "PodNotReady", (("status_ready", "embed-l4"), gauge(1, 0))),
    fault("a pod that loads", "", (("status_ready", "embed-l4"), lambda m: 0 if FAULT <= m < FAULT + 5 else 1)),
    fault("all placeholders preempted", "OverflowUsedUp", (OVERFLOW, gauge(1, 0))),
    fault("no placeholders wanted", "", (("replicas", "embed-a100-half-overflow"), gauge(1, 0))),
    fault("one flavor at its maximum", "FlavorAtMaximum", ((DESIRED, "a100-half"), gauge(1, 8))),
    fault("all at their maximum", "FlavorAtMaximum AllFlavorsAtMaximum", (DESIRED, gauge(1, 8))),
    fault("a fixed number of replicas", "", ("spec_max_replicas", gauge(8, 1))),
    fault("no metrics for the autoscaler", "ScalingInactive", ((INACTIVE, "embed-l4"), gauge(0, 1))),
    fault("scaled to zero", "", ((INACTIVE, "embed-l4"), gauge(0, 1)), ((DESIRED, "embed-l4"), gauge(1, 0))),
    fault("KEDA reads nothing", "ScalerErrors", ("keda_scaler_detail_errors_total", counter(0, 2))),
    fault("the ledger is down", "OutboxOld", ("inferctl_outbox_age_seconds", lambda m: 2 + 60 * max(0, m - FAULT))),
    fault("usage events lost", "UsageEventsDropped", ("inferctl_outbox_dropped_events", gauge(0, 5, LAST))),
    fault("queues of 6 s", "Backlog", ("inferctl_queue_tokens", gauge(20_000, 600_000))),
    fault("queues of 4 s", "", ("inferctl_queue_tokens", gauge(20_000, 400_000))),
    fault("NaN", "NonFiniteVectors", ("inferctl_non_finite_total", gauge(0, 1, LAST))),
    fault("out of memory", "DeviceOutOfMemory", ("inferctl_out_of_memory_total", gauge(0, 1, LAST))),
    fault("an Xid", "GpuError", ("DCGM_FI_DEV_XID_ERRORS", gauge(0, 79, LAST))),
    fault(
        "an Xid, with renamed labels",
        "GpuError",
        ("DCGM_FI_DEV_XID_ERRORS", lost(0, 0)),
        added={
            'DCGM_FI_DEV_XID_ERRORS{exported_pod="embed-l4-7d9f8c6b5-bcdf5",pod="dcgm-exporter-x"}': gauge(0, 79, LAST)
        },
    ),
    fault("nothing in generation", "", watched=CHAT),
    fault("a slow first token", "FirstTokenAboveSlo", *slow(0.02, "0.1", FIRST), watched=CHAT),
    fault("first tokens within the SLO", "", *slow(1.0, "0.07", FIRST), watched=CHAT),
    fault("most requests wait", "Backlog", ("inferctl_requests_waiting", gauge(4, 12)), watched=CHAT),
    fault("a third of the requests wait", "", ("inferctl_requests_waiting", gauge(4, 7)), watched=CHAT),
    fault("preemptions", "KvCacheFull", ("vllm:num_preemptions_total", counter(1, 30)), watched=CHAT),
]


def series_of(case: Case) -> dict[str, Series]:
    found = healthy(case.watched)
    for parts, series in case.changed.items():
        names_of = [key for key in found if all(part in key for part in parts)]
        assert names_of, f"{case.name}: no series has {parts}"
        for key in names_of if case.everywhere else names_of[:1]:
            found[key] = series
    return found | dict(case.added)


def values(series: Series) -> str:
    points = (series(minute) for minute in range(MINUTES))
    return " ".join("_" if point is None else f"{point:.10g}" for point in points)


def as_test(case: Case) -> dict[str, Any]:
    def firing(minute: int, found: frozenset[str]) -> dict[str, Any]:
        return {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(found)],
        }

    return {
        "name": case.name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values(each)} for key, each in series_of(case).items()],
        "promql_expr_test": [firing(BEFORE, frozenset()), firing(AFTER, case.fires)],
    }


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool not found; `apt-get install prometheus` installs it")
    return found


def run(promtool: str, *arguments: str) -> None:
    execute(promtool, *arguments, code=0)


@pytest.mark.parametrize("watched", [EMBED, CHAT], ids=lambda watched: watched.name)
def test_promtool_accepts_the_rules(promtool: str, watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps(groups(watched)))
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(tmp_path / "rules.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("watched", [EMBED, CHAT], ids=lambda watched: watched.name)
def test_each_fault_fires_its_alerts_and_no_others(promtool: str, watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps(groups(watched)))
    cases = [as_test(case) for case in CASES if case.watched is watched]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "2m", "tests": cases}
    (tmp_path / "tests.yaml").write_text(json.dumps(document))
    run(promtool, "test", "rules", str(tmp_path / "tests.yaml"))


@pytest.mark.parametrize("watched", [EMBED, CHAT], ids=lambda watched: watched.name)
def test_each_alert_has_a_case_that_fires_it_and_a_section_in_the_guide(watched: Watched) -> None:
    found = {rule["alert"] for rule in rules(watched)}
    # Alerts of every task are fired by faults of the first model.
    fired = {name for case in CASES for name in case.fires if case.watched in (watched, EMBED)}
    assert found <= fired
    headings = set(re.findall(r"^### (Inferctl\w+)$", (ROOT / "docs/observability.md").read_text(), re.MULTILINE))
    assert found <= headings
    assert headings == {rule["alert"] for each in (EMBED, CHAT) for rule in rules(each)}


@pytest.mark.parametrize("watched", [EMBED, CHAT], ids=lambda watched: watched.name)
def test_alerts_use_only_known_metrics(watched: Watched) -> None:
    for rule in rules(watched):
        assert metric_names.used(rule["expr"]) <= KNOWN_METRICS, rule["alert"]
        # The manifests give no capacity file, so such an alert could never fire.
        assert "capacity_file" not in rule["expr"]


def test_the_summary_has_the_numbers_and_the_rule_its_labels(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps(groups(EMBED)))
    case = next(each for each in CASES if each.name == "rejected for capacity")
    expected = {
        "exp_labels": {"severity": "critical", "namespace": "inference", "model": "embed"},
        "exp_annotations": {
            "summary": "embed: 2% of requests are rejected for lack of capacity",
        },
    }
    test = as_test(case) | {
        "alert_rule_test": [
            {"eval_time": f"{AFTER}m", "alertname": "InferctlRejected", "exp_alerts": [expected]},
            {"eval_time": f"{BEFORE}m", "alertname": "InferctlRejected", "exp_alerts": []},
        ]
    }
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "2m", "tests": [test]}
    (tmp_path / "tests.yaml").write_text(json.dumps(document))
    run(promtool, "test", "rules", str(tmp_path / "tests.yaml"))


def test_the_reasons_are_codes_of_the_server() -> None:
    (rejected,) = (rule["expr"] for rule in rules(EMBED) if rule["alert"] == "InferctlRejected")
    reasons = set(re.findall(r'reason=~"([a-z_|]+)"', rejected)[0].split("|"))
    assert reasons == AT_CAPACITY - {"not_ready"}
    files = [*(ROOT / "inferctl/serve").rglob("*.py"), *(ROOT / "inferctl/batching").glob("*.py")]
    source = "".join(file.read_text() for file in files if file.name != "metrics.py")
    assert all(f'"{reason}"' in source for reason in reasons)


def test_options_that_a_model_lacks_have_no_alerts() -> None:
    plain = Watched("embed", "inference", "embed", EMBED.flavors[1:], keda=False, gpu=False)
    missing = {rule["alert"] for rule in rules(EMBED)} - {rule["alert"] for rule in rules(plain)}
    assert missing == {
        "InferctlBudgetReached",
        "InferctlOverflowUsedUp",
        "InferctlScalerErrors",
        "InferctlOutboxOld",
        "InferctlUsageEventsDropped",
        "InferctlGpuError",
    }
