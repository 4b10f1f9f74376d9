"""The plan of a deployment: rates from receipts, fit, node labels, limits, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.config.spec import Spec
from inferctl.core.errors import InvalidRunError, NotEnoughEvidenceError, UsageError
from inferctl.deploy import explain, gpu, planning, queries
from inferctl.deploy.clusters import Clusters
from inferctl.deploy.measured import read
from inferctl.deploy.plan import ModelPlan
from inferctl.facts import catalog
from inferctl.models import model
from inferctl.models.fit import ModelSize, UnknownSize
from tests.deploy import plans
from tests.deploy.arithmetic.sources import HALF, IMAGE, SMALL, cluster, plan, spec, write_receipt

MODEL_IMAGE = f"registry.example.com/models/e5@sha256:{'cd' * 32}"
TRAFFIC = {"base_rps": 100, "peak_rps": 1000, "tokens_per_request": 250}


def flavor(**keys: Any) -> dict[str, Any]:
    return {"hardware": "l4", "image": IMAGE, "tokens_per_second": 50_000, **keys}


def one(**keys: Any) -> dict[str, Any]:
    return {"flavors": [flavor(**keys)], "traffic": TRAFFIC}


RECEIPT = {"flavors": [{"hardware": "l4", "image": IMAGE, "receipt": "r.json"}], "traffic": TRAFFIC}


def test_a_receipt_gives_the_rate_precision_load_drain_memory_and_cores(tmp_path: Path) -> None:
    resources = {"server_peak_bytes": 3_900_000_000, "server_cores": 2.4}
    write_receipt(tmp_path / "r.json", HALF, 400.0, resources=resources)
    deploy = {"flavors": [{"hardware": HALF, "image": IMAGE, "receipt": "r.json"}], "traffic": TRAFFIC}
    (found,) = plan(spec(deploy), tmp_path).models[0].flavors
    assert found.rate
    assert (found.rate.tokens_per_second, found.rate.measured) == (100_000, True)
    assert found.rate.source.endswith("(measured 2026-11-20, within the SLO): 400 requests/s x 250 tokens")
    assert (found.precision, found.sharing, found.label) == ("bf16", "mig", "a100-40gb-mig-3g-20gb")
    assert (found.load_s.value, found.startup_failures.value) == (41.5, 25)
    assert (found.drain_s.value, found.cpu.value, found.memory_bytes.value) == (25, 3, 4650 * 1024**2)


def test_a_closed_loop_gives_a_rate_with_a_warning_and_an_open_one_none(tmp_path: Path) -> None:
    write_receipt(tmp_path / "r.json", "l4", 200.0, search=None, plan={"load": {"task": "embed", "mode": "closed"}})
    found = plan(spec(RECEIPT), tmp_path).models[0]
    assert found.flavors[0].rate
    assert found.flavors[0].rate.tokens_per_second == 50_000
    assert any("throughput of a closed loop" in warning for warning in found.warnings)
    write_receipt(tmp_path / "r.json", "l4", 200.0, search=None)
    with pytest.raises(NotEnoughEvidenceError, match="open loop without a search"):
        plan(spec(RECEIPT), tmp_path)


def test_a_search_of_generation_gives_tokens_of_prompts_and_answers(tmp_path: Path) -> None:
    summary = {"requests_per_s": 4.0, "tokens_per_request": 512.0, "output_tokens_per_request": 128.0}
    load = {"load": {"task": "generate", "mode": "open"}}
    write_receipt(tmp_path / "r.json", "l4", 4.0, plan=load, summary=summary)
    unknown = UnknownSize("no network", "")
    (found,) = plan(spec(RECEIPT), tmp_path, task="generate", size=unknown).models[0].flavors
    assert found.rate
    assert found.rate.tokens_per_second == 2560  # 4 x (512 + 128)
    # Weights of unknown size count as 150 GB: the probe waits for 900 + 1,500 + 60 s.
    assert found.startup_failures.value * found.startup_period_s.value == 2460
    with pytest.raises(UsageError, match="is of the task generate, but the model is for embed"):
        plan(spec(RECEIPT), tmp_path)


def test_a_sample_receipt_does_not_count_as_measured(tmp_path: Path) -> None:
    write_receipt(tmp_path / "r.json", "l4", 200.0, sample=True)
    found = plan(spec(RECEIPT), tmp_path).models[0]
    assert found.flavors[0].rate
    assert not found.flavors[0].rate.measured
    assert found.flavors[0].rate.source.startswith("sample receipt ")
    assert "invented" in found.flavors[0].rate.origin
    assert any("invented figures" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hardware": {"key": "t4", "name": "T4"}}, UsageError, "was measured on t4, not on l4"),
        ({"quality": {"checked": True, "passes": False}}, NotEnoughEvidenceError, "below the quality limits"),
        (
            {"validity": {"valid": False, "reasons": ["9 requests failed"], "cautions": []}},
            InvalidRunError,
            "9 requests failed",
        ),
    ],
)
def test_receipts_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    write_receipt(tmp_path / "r.json", "l4", 200.0, **changes)
    with pytest.raises(error, match=message) as caught:
        plan(spec(RECEIPT), tmp_path)
    assert str(caught.value).startswith("deploy.flavors[0]: ")


@pytest.mark.parametrize(
    ("model", "differs"),
    [
        ({"sha256": "ab" * 32}, False),
        ({"sha256": "cd" * 32}, True),
        ({"sha256": "cd" * 32, "original_sha256": "ab" * 32}, False),  # quantized from this model
        ({}, False),
    ],
)
def test_a_receipt_of_another_model_is_a_warning(model: dict[str, Any], differs: bool, tmp_path: Path) -> None:
    file = write_receipt(tmp_path / "r.json", "l4", 200.0, model={"source": "test", **model})
    found = read(file, catalog.hardware("l4"), "embed", lambda: "ab" * 32)
    expected = ("r.json was measured with another model: sha256 cdcdcdcdcdcd, not abababababab. Measure this model",)
    assert found.warnings == (expected if differs else ())
    assert read(file, catalog.hardware("l4"), "embed").warnings == ()


def test_a_model_on_this_machine_is_compared_with_its_receipts(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"name": "embed", "model": {"source": str(minilm), "weights": "bake"}, "deploy": RECEIPT}
    (tmp_path / "inferctl.yaml").write_text(json.dumps(data))
    for digest, differs in ((model.find(str(minilm)).digest, False), ("cd" * 32, True)):
        write_receipt(tmp_path / "r.json", "l4", 200.0, model={"source": "test", "sha256": digest})
        assert cli.run(["deploy", "--json", "-f", str(tmp_path / "inferctl.yaml")]) == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]
        assert any("was measured with another model" in each for each in warnings) is differs


def test_a_flavor_without_a_rate_needs_its_limits_and_keeps_its_minimum() -> None:
    with pytest.raises(UsageError, match="has no min_replicas and no max_replicas, and without a rate") as caught:
        plan(spec(one(tokens_per_second=None)))
    assert caught.value.hint
    found = plan(spec(one(tokens_per_second=None, min_replicas=2, max_replicas=5))).models[0]
    assert found.flavors[0].placements[0].replicas
    assert found.flavors[0].placements[0].replicas.value == 2
    assert any("not scaled by work" in warning for warning in found.warnings)


def test_without_traffic_the_limits_are_required() -> None:
    with pytest.raises(UsageError, match=r"without deploy\.traffic"):
        plan(spec({"flavors": [flavor(min_replicas=1)]}))
    placed = plan(spec({"flavors": [flavor(min_replicas=1, max_replicas=4)]})).models[0].flavors[0].placements[0]
    assert (placed.min_replicas.value, placed.max_replicas.value, placed.overflow) == (1, 4, None)


def test_a_model_that_does_not_fit_its_slice_is_refused_with_the_arithmetic() -> None:
    large = ModelSize(8_000_000_000, SMALL.config)
    with pytest.raises(UsageError, match=r"a100-40gb-mig-1g.5gb: .*5\.0 GB") as caught:
        plan(spec(one(hardware="a100-40gb-mig-1g.5gb")), size=large)
    assert caught.value.hint


def test_the_memory_on_the_slice_is_shown_with_its_parts() -> None:
    # Weights 100,000,000 x 2 bytes; activations 16,384 x (5 x 768 + 2 x 3,072) x 2; 1 GB for CUDA.
    (found,) = plan(spec(one(hardware=HALF))).models[0].flavors
    (figure,) = (each for each in explain.flavor_figures(found) if each.name == "GPU memory")
    assert figure.value == 200_000_000 + 327_155_712 + 1_000_000_000
    assert figure.formula == "200.0 MB + 327.2 MB + 1.0 GB"
    assert figure.source == "estimated: weights, activations and overhead, of 20.0 GB"


def test_pods_that_share_a_gpu_share_its_memory() -> None:
    # 6 GB of weights fit into 24 GB, but not into a quarter of it.
    size = ModelSize(3_000_000_000, SMALL.config)
    assert plan(spec(one()), size=size).models[0].flavors[0].fit.memory_bytes == 24_000_000_000
    with pytest.raises(UsageError, match=r"6\.0 GB"):
        plan(spec(one(shared_by=4)), size=size)


def test_vllm_servers_that_share_a_gpu_must_not_each_take_all_of_it() -> None:
    made = spec(one(shared_by=2), image={"base": "vllm-cuda13.0"})
    with pytest.raises(UsageError, match=r"each takes serve.gpu_memory_share: 0\.9") as caught:
        plan(made, task="generate", size=SMALL)
    assert caught.value.hint == "set serve.gpu_memory_share to at most 0.47"


def test_the_memory_share_of_vllm_is_one_of_the_whole_gpu() -> None:
    def kv_cache(**sharing: Any) -> int:
        made = spec(one(**sharing), image={"base": "vllm-cuda13.0"}, serve={"gpu_memory_share": 0.45})
        (flavor,) = plan(made, task="generate", size=plans.GENERATE_SIZE).models[0].flavors
        assert flavor.fit.capacity
        return flavor.fit.capacity.kv_cache_bytes

    assert kv_cache(shared_by=2) == kv_cache() > 0


@pytest.mark.parametrize(
    ("deploy", "sections", "message"),
    [
        ({}, {}, "has no hardware to run on"),
        (one(image=None), {}, "has no image"),
        (one(hardware="l5"), {}, r"deploy.flavors\[0\]: hardware 'l5' not found"),
        (one(), {"model": {"source": "a/b"}}, r"deploy\.weights names no volume"),
        (one(), {"access": {"keys": "keys.json"}}, "no Secret has the key file"),
        ({**one(), "keys_secret": "s"}, {}, "the server asks for no keys"),
        ({"flavors": [flavor()], "traffic": {"base_rps": 1, "peak_rps": 2}}, {}, "has no tokens_per_request"),
        (one(hardware="a100-40gb-pcie"), {}, r"has no label nvidia.com/gpu.product"),
    ],
)
def test_what_is_missing_is_named(deploy: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(spec(deploy, **sections))


@pytest.mark.parametrize(
    ("deploy", "image", "words"),
    [
        (one(image=None), {"repository": "registry.example.com/ml/embed", "tag": "1"}, "ml/embed:1 has no digest"),
        # One replica serves 0.7 x 50,000 = 35,000 of 250,000 tokens/s: 14%.
        (one(max_replicas=1), {}, "all replicas at their maximum serve 14% of the peak of embed"),
    ],
)
def test_what_limits_or_floats_is_a_warning(deploy: dict[str, Any], image: dict[str, str], words: str) -> None:
    found = plan(spec(deploy, **({"image": image} if image else {}))).models[0]
    assert any(words in warning for warning in found.warnings), found.warnings


def test_hardware_that_a_cluster_lacks_is_left_out_there() -> None:
    deploy = {"flavors": [flavor(), flavor(hardware="t4", tokens_per_second=10_000)], "traffic": TRAFFIC}
    clusters = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5, "max_replicas": {"l4": 0}}]
    first, second = plan(spec(deploy), clusters=clusters).models[0].flavors
    assert [placed.max_replicas.value for placed in first.placements] == [4, 0]
    assert first.placements[1].replicas
    assert first.placements[1].overflow is None
    # 0.5 x 250,000 / 7,000 = 17.9 -> 18, and the overflow belongs to the first flavor that is there.
    assert second.placements[1].max_replicas.value == 18
    assert second.placements[1].overflow
    assert second.placements[0].overflow is None
    # A number too goes to the first flavor that the cluster can have.
    first, second = plan(spec({**deploy, "overflow": 2}), clusters=clusters).models[0].flavors
    assert [each.overflow.value if each.overflow else 0 for each in first.placements] == [2, 0]
    assert [each.overflow.value if each.overflow else 0 for each in second.placements] == [0, 2]


GKE = {"gpu_labels": "gke"}


@pytest.mark.parametrize(
    ("key", "shared_by", "keys", "name", "labels"),
    [
        (HALF, 1, {}, "nvidia.com/mig-3g.20gb", {"gpu.product": "NVIDIA-A100-SXM4-40GB"}),
        (HALF, 1, {"mig_strategy": "single"}, "nvidia.com/gpu", {"gpu.product": "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"}),
        (HALF, 1, GKE, "nvidia.com/gpu", {"gke-gpu-partition-size": "3g.20gb"}),
        ("l4", 1, {}, "nvidia.com/gpu", {"gpu.product": "NVIDIA-L4"}),
        ("l4", 1, GKE, "nvidia.com/gpu", {"gke-accelerator": "nvidia-l4"}),
        ("l4", 2, {}, "nvidia.com/gpu.shared", {"gpu.product": "NVIDIA-L4"}),
    ],
)
def test_the_gpu_has_the_name_and_labels_of_the_cluster(
    key: str, shared_by: int, keys: dict[str, Any], name: str, labels: dict[str, str]
) -> None:
    found = gpu.resource(catalog.hardware(key), 1, cluster(**keys), shared_by)
    assert found
    assert found.name == name
    values = {label.rpartition("/")[2]: value for label, value in found.labels.items()}
    assert {label: (value,) for label, value in labels.items()}.items() <= values.items()
    # A node whose slices are not made yet offers the whole GPU. GKE makes slices before a node joins.
    assert ("mig.config.state" in values) == (key == HALF and keys != GKE)


def test_two_models_must_fit_the_limits_of_a_cluster_together(tmp_path: Path) -> None:
    sources = [
        planning.SpecSource(spec(one(min_replicas=2, max_replicas=4), name=name), tmp_path, SMALL, "embed")
        for name in ("first", "second")
    ]

    def resolved(limit: int) -> list[str]:
        found = Clusters.model_validate({"clusters": [{"name": "a", "max_replicas": {"l4": limit}}]}).resolved()
        return list(planning.make_plan(sources, found).warnings)

    assert not any("add up" in warning for warning in resolved(8))
    assert any("the maxima of first-l4 and second-l4 add up to 8" in warning for warning in resolved(6))
    # With two replicas or more, a rollout needs no free GPU.
    assert not any("for a rollout" in warning for warning in resolved(6))
    assert resolved(4)  # the minima fit exactly
    with pytest.raises(UsageError, match="first-l4 and second-l4 need 4 at their minimum"):
        resolved(3)


def test_rollouts_and_overflow_stay_within_the_limit_of_a_cluster() -> None:
    # An L4 is planned with 35,000 tokens/s: base 25,000 -> 2, peak 250,000 -> 8. Rise 3,750 x 60 / 50,000 = 4.5 -> 5.
    def planned(limit: int, **keys: Any) -> tuple[Any, list[str]]:
        found = plan(spec(one(**keys)), clusters=[{"name": "a", "max_replicas": {"l4": limit}}])
        return found.models[0].flavors[0], found.all_warnings

    flavor_plan, warnings = planned(13)
    assert flavor_plan.placements[0].overflow.value == 5
    assert warnings == []
    flavor_plan, (warning,) = planned(10)
    figure = flavor_plan.placements[0].overflow
    assert (figure.value, figure.formula) == (2, "min(2, ceil(3,750 x min(240, 60) / 50,000))")
    assert "the overflow of embed-l4 is 2 instead of 5: the cluster can have 10 of l4" in warning
    flavor_plan, (warning,) = planned(8)
    assert flavor_plan.placements[0].overflow is None
    # One replica needs a GPU more for its rollout: 1 + 1. The overflow gets the rest.
    flavor_plan, warnings = planned(4, min_replicas=1, max_replicas=2)
    assert (flavor_plan.surge, flavor_plan.placements[0].overflow.value) == (1, 1)
    flavor_plan, warnings = planned(2, min_replicas=1, max_replicas=2)
    assert (flavor_plan.surge, flavor_plan.placements[0].overflow) == (0, None)
    assert any("no l4 is left for a rollout of embed-l4" in each for each in warnings)
    flavor_plan, warnings = planned(8, min_replicas=2, max_replicas=8)
    assert flavor_plan.surge == 0
    assert not any("rollout of" in each for each in warnings)


def test_two_models_share_what_a_cluster_has_for_overflow(tmp_path: Path) -> None:
    sources = [planning.SpecSource(spec(one(), name=name), tmp_path, SMALL, "embed") for name in ("first", "second")]
    clusters = Clusters.model_validate({"clusters": [{"name": "a", "max_replicas": {"l4": 22}}]}).resolved()
    first, second = (each.flavors[0].placements[0] for each in planning.make_plan(sources, clusters).models)
    # 8 + 8 are the maxima, so 6 are left: 5 for the first, 1 for the second.
    assert first.overflow
    assert second.overflow
    assert (first.overflow.value, second.overflow.value) == (5, 1)


def test_more_replicas_than_any_cluster_has_are_refused_with_the_arithmetic() -> None:
    # 250,000 / (0.7 x 1) = 357,142.9
    with pytest.raises(
        UsageError, match=r"needs 357,143 replicas at peak, more than 100,000: ceil\(250,000 / "
    ) as caught:
        plan(spec(one(tokens_per_second=1)))
    assert caught.value.hint == "correct deploy.traffic, or the rate of the flavor"
    # 250,000 / (0.7 x 4) = 89,285.7
    assert plan(spec(one(tokens_per_second=4))).models[0].flavors[0].placements[0].max_replicas.value == 89_286


def test_the_limit_of_a_key_is_divided_among_the_replicas_at_the_peak() -> None:
    # An L4 is planned with 35,000 tokens/s. Half of the peak: 125,000 / 35,000 = 3.6 -> 4 in each cluster. A T4 with
    # 10,000 can stand in for them: 125,000 / 7,000 = 17.9 -> 18, but none is needed. Minima: 2 + 2.
    deploy = {"flavors": [flavor(), flavor(hardware="t4", tokens_per_second=10_000)], "traffic": TRAFFIC}
    clusters = [{"name": "a"}, {"name": "b"}]
    found = plan(spec(deploy, access={"requests_per_minute": 1000}), clusters=clusters).models[0]
    assert found.key_servers
    assert (found.key_servers.value, found.key_servers.formula) == (8, "4 + 4")
    (warning,) = (each for each in found.warnings if "access.broker" in each)
    assert "applies 1/8 of the limit of a key" in warning
    assert "With the 4 of the minima, a key gets 50% of it" in warning
    # Keys in the file of the Secret can have their own limits.
    keys = plan(spec({**deploy, "keys_secret": "s"}, access={"keys": "keys.json"}), clusters=clusters).models[0]
    assert keys.key_servers == found.key_servers
    assert not any("access.broker" in each for each in keys.warnings)
    assert plan(spec(deploy), clusters=clusters).models[0].key_servers is None
    # Without a rate, the servers of a key are those that run.
    fixed = spec(one(tokens_per_second=None, min_replicas=2, max_replicas=5), access={"tokens_per_minute": 9})
    assert (figure := plan(fixed).models[0].key_servers) and figure.value == 2


def test_unknown_weights_are_a_warning_about_what_lacks_them(tmp_path: Path) -> None:
    measured = write_receipt(tmp_path / "l4.json", "l4", 100.0, resources={"server_peak_bytes": 2**30})
    unknown, receipt_of = UnknownSize("no network", ""), one(tokens_per_second=None, receipt=str(measured))
    for deploy, weights, size, lacking in (
        (one(), "bake", unknown, ["memory limit"]),
        (one(), "bake", SMALL, None),
        (receipt_of, "bake", unknown, None),
        (receipt_of, "download", unknown, ["volume of the download"]),
    ):
        (planned,) = plan(spec(deploy, model={"source": "org/x", "weights": weights}), size=size).models
        found = [warning for warning in planned.warnings if "size of the weights is unknown" in warning]
        assert [part for each in found for part in re.findall(r"in its (.*), and pods", each)] == (lacking or [])


def plan_of_several(deploy: dict[str, Any], weights: str = "bake", size: ModelSize = SMALL) -> ModelPlan:
    """Return the plan of an embedding model in fp32 and a reranker on one server."""
    embed = {"name": "embed", "model": {"source": "./m", "weights": weights}, "serve": {"precision": "fp32"}}
    rerank = {"name": "rerank", "model": {"source": "./m", "weights": weights}, "slo": {"p99_ms": 40}}
    document = {"name": "both", "models": [embed, rerank], "slo": {"p99_ms": 70}, "deploy": deploy}
    made, tasks = Spec.model_validate(document), ("embed", "rerank")
    sources = [planning.SpecSource(each, Path(), size, task) for each, task in zip(made.each(), tasks, strict=True)]
    return planning.make_plan([planning.of_several(made, sources)], [cluster()]).models[0]


def test_the_models_of_a_server_need_the_sum_of_their_memory_and_each_has_its_slo() -> None:
    found, flavor = plan_of_several(one()), plan_of_several(one()).flavors[0]
    memory, alone = flavor.fit.memory, plan(spec(one())).models[0].flavors[0].fit.memory
    assert memory and alone and (memory.weights, memory.overhead) == (3 * alone.weights, 2 * alone.overhead)
    assert (found.task, flavor.precision, flavor.load_s.value) == ("embed-rerank", "auto", 240)
    large = ModelSize(4_000_000_000, SMALL.config)
    plan(spec(one(), serve={"precision": "fp32"}), size=large)
    with pytest.raises(UsageError, match=r"all models need about .*embed .*rerank "):
        plan_of_several(one(), size=large)
    made = queries.of(found, found.flavors, cluster(), "inference")
    (latency,) = (query.promql for query in made if query.name == "p99-rerank")
    assert 'model="rerank"' in latency and " / 0.04)" in latency


@pytest.mark.parametrize(
    ("deploy", "weights", "message"),
    [
        (one(receipt="r.json", tokens_per_second=None), "bake", "a receipt does not say how fast a mix"),
        ({**one(), "bench": True, "tools_image": IMAGE}, "bake", "a receipt does not say how fast a mix"),
        (one(), "mount", "embed has mounted weights, but no volume"),
        ({**one(), "weights": {"pvc": "shared"}}, "bake", "pvc is of one model"),
    ],
)
def test_what_cannot_be_said_of_several_models_is_refused(deploy: dict[str, Any], weights: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of_several(deploy, weights)


@pytest.mark.parametrize(
    ("model", "weights", "way", "names"),
    [
        ({"weights": "mount", "source": f"oci://{MODEL_IMAGE}"}, {}, "image volume", (MODEL_IMAGE, "1.35", "pvc")),
        ({"weights": "mount", "source": "oci://example.com/m"}, {}, "image volume", ("example.com/m:latest", "1.35")),
        ({"weights": "mount"}, {"pvc": "shared"}, "claim", ("shared", "deploy.weights.pvc")),
        # The claim wins, as in the pod.
        ({"weights": "mount", "source": f"oci://{MODEL_IMAGE}"}, {"pvc": "shared"}, "claim", ("shared",)),
        ({"weights": "bake"}, {}, "layer of the image", ("model.weights: bake",)),
        ({"weights": "download"}, {}, "download", ("org/x", "model.weights: download")),
    ],
)
def test_a_row_says_how_the_weights_reach_the_pods(
    model: dict[str, Any], weights: dict[str, Any], way: str, names: tuple[str, ...]
) -> None:
    document = {
        "name": "x",
        "model": {"source": "org/x", "task": "embed", **model},
        "deploy": {
            "flavors": [{"hardware": "l4", "image": IMAGE, "min_replicas": 1, "max_replicas": 1}],
            "weights": weights,
        },
    }
    (planned,) = plan(Spec.model_validate(document), clusters=[{"name": "a"}]).models
    found = [(where, figure) for where, figure in explain.rows(planned, ()) if figure.name == "weights"]
    ((where, figure),) = found
    assert (where, figure.value, figure.unit) == ("x", 1, way)
    assert all(name in f"{figure.formula} {figure.source}" for name in names)
    assert ("1.35" in figure.source) == (way == "image volume")
