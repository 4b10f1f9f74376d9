"""Inputs at the edges of the arithmetic: one replica, long and short cold starts, receipts that are not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.deploy.measured import looser_bounds
from inferctl.deploy.plan import FlavorPlan, ModelPlan
from inferctl.receipts import receipt
from tests.deploy.arithmetic.sources import IMAGE, plan, receipt_document, spec

TRAFFIC = {"base_rps": 200, "peak_rps": 1400, "tokens_per_request": 250, "rise_s": 60}
L4 = {"hardware": "l4", "tokens_per_second": 40_000, "image": IMAGE}
T4 = {"hardware": "t4", "tokens_per_second": 15_000, "image": IMAGE}


def model(*flavors: dict[str, Any], clusters: list[dict[str, Any]] | None = None, **deploy: Any) -> ModelPlan:
    sections = {key: deploy.pop(key) for key in ("cache", "slo") if key in deploy}
    made = spec({"flavors": list(flavors), "traffic": TRAFFIC, **deploy}, **sections)
    return plan(made, clusters=clusters).models[0]


def scalers(*flavors: dict[str, Any], **deploy: Any) -> list[dict[str, Any]]:
    made = plan(spec({"flavors": list(flavors), "traffic": TRAFFIC, **deploy}))
    found = yaml.safe_load_all(layout.files(made)["overlays/default/scaling.yaml"])
    return [each["spec"] for each in found]


def test_without_an_autoscaler_max_replicas_still_bounds_a_flavor() -> None:
    """350,000 tokens/s are 12.5 L4. Three serve 84,000, and 266,000 / 10,500 = 25.3 T4 the rest."""
    first, second = model({**L4, "max_replicas": 3}, T4, scaling="none").flavors
    assert [each.placements[0].replicas.value for each in (first, second) if each.placements[0].replicas] == [3, 26]


@pytest.mark.parametrize(
    ("least", "clusters", "surge"),
    [
        ([2, 0], ["a"], 0),
        ([1, 0], ["a"], 1),
        ([1, 0], ["a", "b"], 1),  # one replica in each cluster: the others do not serve its clients
        ([1, 1], ["a"], 1),  # a new image changes both flavors at once
        ([0, 2], ["a", "b"], 0),
    ],
)
def test_a_rollout_leaves_a_replica_in_each_cluster(least: list[int], clusters: list[str], surge: int) -> None:
    flavors = [{**flavor, "min_replicas": count} for flavor, count in zip((L4, T4), least, strict=True)]
    made = model(*flavors, clusters=[{"name": name} for name in clusters])
    assert {placed.surge for flavor in made.flavors for placed in flavor.placements} == {surge}


def test_only_the_cluster_with_one_replica_needs_a_free_gpu() -> None:
    clusters = [{"name": "a"}, {"name": "b", "max_replicas": {"l4": 1}}, {"name": "c", "max_replicas": {"l4": 0}}]
    flavors = [{**L4, "min_replicas": 2}, {**T4, "min_replicas": 0, "max_replicas": 1}]
    made = plan(spec({"flavors": flavors, "traffic": TRAFFIC}), clusters=clusters)
    assert [placed.surge for placed in made.models[0].flavors[1].placements] == [0, 1, 1]
    # The cluster b can have one L4, so its replica stops first.
    assert [placed.surge for placed in made.models[0].flavors[0].placements] == [0, 0, 0]
    files = layout.files(made)
    (base,) = (each for each in yaml.safe_load_all(files["base/embed.yaml"]) if each["metadata"]["name"] == "embed-t4")
    patches = {
        name: [
            each["spec"]["strategy"]["rollingUpdate"]
            for each in yaml.safe_load_all(text)
            if "strategy" in each.get("spec", {})
        ]
        for name in ("a", "b", "c")
        if (text := files.get(f"overlays/{name}/flavors.yaml"))
    }
    assert base["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert patches["a"] == [{"maxSurge": 0, "maxUnavailable": 1}]
    assert not patches.get("b")


def test_the_memory_limit_has_room_for_cached_vectors() -> None:
    """`inferctl bench` measures without the cache, so no receipt has its memory."""
    without, with_cache = model(L4).flavors[0], model(L4, cache={"size": "16GiB"}).flavors[0]
    assert with_cache.memory_bytes.value - without.memory_bytes.value == 16 * 1024**3
    assert "cache.size" in with_cache.memory_bytes.note


@pytest.mark.parametrize(("least", "warned"), [((0, 0), True), ((1, 0), False), ((0, 1), False)])
def test_a_model_that_may_have_no_replica_at_all_is_a_warning(least: tuple[int, int], warned: bool) -> None:
    flavors = [{**flavor, "min_replicas": count} for flavor, count in zip((L4, T4), least, strict=True)]
    assert any("nothing notices the first request" in each for each in model(*flavors).warnings) is warned


@pytest.mark.parametrize(("port", "warned"), [(80, True), (8080, False)])
def test_a_port_of_root_is_a_warning(port: int, warned: bool) -> None:
    made = plan(spec({"flavors": [L4], "traffic": TRAFFIC}, serve={"port": port}))
    assert any("give ports below 1024 to root" in each for each in made.models[0].warnings) is warned


@pytest.mark.parametrize(("cold_start_s", "window"), [(240, 300), (1800.5, 1801), (7200, 3600)])
def test_the_window_of_an_autoscaler_is_one_that_the_api_server_accepts(cold_start_s: float, window: int) -> None:
    (scaler,) = scalers(L4, cold_start_s=cold_start_s)
    behavior = scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == window
    assert (behavior["scaleUp"]["stabilizationWindowSeconds"], scaler["cooldownPeriod"]) == (0, window)


def test_a_cold_start_below_a_second_gives_a_range_that_prometheus_accepts() -> None:
    _, second = scalers(L4, T4, cold_start_s=0.5)
    for trigger in second["triggers"]:
        assert "[1s]" in trigger["metadata"]["query"]


def write(folder: Path, document: dict[str, Any], **replaced: str) -> Path:
    """Write a receipt with a seal that is right. `replaced`: text -> other text, after the seal was computed."""
    data = json.loads(json.dumps({"schema": receipt.SCHEMA, **document}))
    text = json.dumps(data | {"seal": receipt.seal_of(data)})
    for old, new in replaced.items():
        text = text.replace(old, new)
    file = folder / "receipt.json"
    file.write_text(text)
    return file


def measured(file: Path, *, slo: dict[str, float] | None = None, **flavor: Any) -> ModelPlan:
    return model({"hardware": "l4", "receipt": str(file), "image": IMAGE, **flavor}, slo=slo or {})


@pytest.mark.parametrize(
    "changes",
    [
        *({key: None} for key in ("hardware", "model", "precision", "runs", "summary", "validity")),
        *({"search": {"max_goodput_rps": rate}} for rate in (-5.0, 1e300, 1e-300, "240", [240])),
        {"search": None, "plan": {"load": {}}, "summary": {"requests_per_s": 0.0, "tokens_per_request": 250.0}},
        {"summary": {"requests_per_s": 240.0, "tokens_per_request": "250"}},
        {"precision": {"effective": "bf17"}},
    ],
    ids=str,
)
def test_a_receipt_with_values_that_no_bench_writes_is_an_error(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"receipt\.json"):
        measured(write(tmp_path, receipt_document("l4", 240.0, **changes)))


@pytest.mark.parametrize("key", ["created", "hardware", "model"])
def test_a_receipt_that_lacks_a_key_or_has_an_infinite_rate_is_an_error(key: str, tmp_path: Path) -> None:
    document = receipt_document("l4", 240.0)
    with pytest.raises(UsageError, match=r"cannot read .* as a receipt"):
        measured(write(tmp_path, document, **{"240.0": "1e999"}))
    del document[key]
    with pytest.raises(UsageError, match=key):
        measured(write(tmp_path, document))


@pytest.mark.parametrize(("searched", "wanted", "warned"), [(500, 100, True), (100, 100, False), (50, 100, False)])
def test_a_search_with_a_longer_latency_than_the_slo_is_a_warning(
    searched: float, wanted: float, warned: bool, tmp_path: Path
) -> None:
    document = receipt_document("l4", 240.0, search={"max_goodput_rps": 240.0, "slo_p99_ms": searched})
    made = measured(write(tmp_path, document), slo={"p99_ms": wanted})
    assert any("and slo.p99_ms is 100" in warning for warning in made.warnings) == warned


def test_bounds_of_streams_are_compared_too() -> None:
    wanted = Spec.model_validate({"name": "a", "model": {"source": "a/b"}, "slo": {"ttft_ms": 1000, "itl_ms": 50}}).slo
    search = {"slo_p99_ms": 100, "bounds_ms": {"ttft": 800, "itl": 80}}
    (found,) = looser_bounds(search, wanted, "generate")
    assert "time between tokens of up to 80 ms" in found


def test_a_receipt_of_a_gpu_alone_is_a_warning_for_a_shared_one(tmp_path: Path) -> None:
    file = write(tmp_path, receipt_document("l4", 240.0))
    assert not any("share its GPU" in each for each in measured(file).warnings)
    warnings = measured(file, shared_by=4).warnings
    assert any("while 4 pods share its GPU" in each for each in warnings)


def test_limits_of_a_cluster_count_for_hardware_of_your_own(tmp_path: Path) -> None:
    """The clusters file and the spec name it by different paths, so the name of the file counts."""
    catalog = Path(layout.__file__).parents[2] / "benchmarks" / "hardware" / "l4.yaml"
    file = shutil.copy(catalog, tmp_path / "My_L4.yaml")
    cluster = {"name": "k", "max_replicas": {"hardware/My_L4.yaml": 4}}
    made = plan(
        spec({"flavors": [{**L4, "hardware": str(file)}], "traffic": TRAFFIC, "overflow": 3}), clusters=[cluster]
    )
    flavor: FlavorPlan = made.models[0].flavors[0]
    assert (flavor.placements[0].max_replicas.value, flavor.placements[0].overflow) == (4, None)
    files = layout.files(made)
    (quota,) = yaml.safe_load_all(files["overlays/k/quota.yaml"])
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "4"}
