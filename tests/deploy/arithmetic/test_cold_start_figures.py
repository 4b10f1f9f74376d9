"""How the weights reach a pod, and how long a new node takes until it serves: what is set, estimated and assumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from deploy_sources import IMAGE, plan

from inferctl.config.spec import Spec
from inferctl.deploy import explain, sizing
from inferctl.deploy.figure import Figure
from inferctl.deploy.plan import FlavorPlan, Rate
from inferctl.facts import catalog
from inferctl.image import cold_start
from inferctl.models.fit import ModelSize, UnknownSize

DIGEST = f"sha256:{'cd' * 32}"
MODEL_IMAGE = f"registry.example.com/models/e5@{DIGEST}"
# 100 million parameters in 16 bits.
SMALL = ModelSize(
    100_000_000, {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 30_000}, weights_bytes=200_000_000
)
UNKNOWN = UnknownSize("no network", "")
GENERATOR = ModelSize(
    100_000_000, {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}, weights_bytes=200_000_000
)


def seconds(name: str, value: float) -> Figure:
    return Figure(name, value, "s", "", "a source")


@pytest.mark.parametrize(
    ("setting", "image", "load", "value", "formula", "source"),
    [
        (150.0, (30.0, 69.0), 40.0, 150, "", "spec deploy.cold_start_s"),
        # The time in which a cloud adds a node is in no size of an image: 120 + 30.2 + 69 + 40 = 259.2 -> 260.
        (None, (30.2, 69.0), 40.0, 260, "ceil(120 + 30.2 + 69 + 40)", "estimated"),
        # Even a tiny image and a fast load wait for the node: 120 + 0.1 + 0.1 + 0.5 -> 121.
        (None, (0.1, 0.1), 0.5, 121, "ceil(120 + 0.1 + 0.1 + 0.5)", "estimated"),
        # Without a size, 240 s; but never less than the node and the load.
        (None, (), 40.0, 240, "ceil(max(240, 120 + 40))", "assumed"),
        (None, (), 900.5, 1021, "ceil(max(240, 120 + 900.5))", "assumed"),
    ],
)
def test_a_cold_start_is_set_or_the_sum_of_its_parts(
    setting: float | None, image: tuple[float, ...], load: float, value: int, formula: str, source: str
) -> None:
    found = sizing.cold_start(setting, [seconds("part", each) for each in image], seconds("load time", load))
    assert (found.value, found.formula) == (value, formula)
    assert found.source.startswith(source)


@pytest.mark.parametrize(
    ("setting", "rate", "download", "estimate", "value"),
    [
        (20.0, 41.5, 30.0, (7.8, "7 s + 0.8 s"), 20),
        # The receipt may be of a run with the model in its cache; the pods download it first.
        (None, 41.5, 30.0, (7.8, "7 s + 0.8 s"), 71.5),
        (None, 41.5, 0.0, (7.8, "7 s + 0.8 s"), 41.5),
        (None, None, 30.0, (7.8, "7 s + 0.8 s"), 37.8),
        (None, None, 0.0, (7.8, "7 s + 0.8 s"), 7.8),
        (None, None, 30.0, None, 150),
        (None, None, 0.0, None, 120),
    ],
)
def test_a_load_time_has_the_download_unless_it_is_set(
    setting: float | None,
    rate: float | None,
    download: float,
    estimate: tuple[float, str] | None,
    value: float,
) -> None:
    measured = Rate(1.0, measured=True, source="", seal="01234567", load_s=rate) if rate else None
    found = sizing.load_s(setting, measured, download, estimate)
    assert found.value == value
    assert ("estimated" in found.source) == (value in (71.5, 37.8, 7.8, 150))
    assert found.formula == "7 s + 0.8 s" or value != 7.8


def planned(
    size: ModelSize | UnknownSize = SMALL, base: str = "cuda13.0", model: dict[str, Any] | None = None, **deploy: Any
) -> FlavorPlan:
    flavor = {"hardware": "l4", "tokens_per_second": 1000, "image": IMAGE}
    task = "generate" if base.startswith("vllm") else "embed"
    document = {
        "name": "x",
        "model": {"source": "org/x", "task": task, "weights": "bake", **(model or {})},
        "image": {"base": base},
        "deploy": {"flavors": [flavor], "traffic": {"base_rps": 1, "peak_rps": 2, "tokens_per_request": 9}, **deploy},
    }
    return plan(Spec.model_validate(document), size=size, task=task).models[0].flavors[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "base", "model", "deploy", "starts"),
    [
        (SMALL, "cuda13.0", {}, {}, "estimated"),
        (SMALL, "cuda13.0", {"weights": "download"}, {}, "estimated"),
        (SMALL, "cuda13.0", {"weights": "mount"}, {"weights": {"pvc": "a"}}, "estimated"),
        # Weights in a claim are read, not pulled, so their size does not count.
        (UNKNOWN, "cuda13.0", {"weights": "mount"}, {"weights": {"pvc": "a"}}, "estimated"),
        (GENERATOR, "vllm-cuda13.0", {}, {}, "estimated"),
        (UNKNOWN, "cuda13.0", {}, {}, "assumed"),
        (UNKNOWN, "cuda13.0", {"weights": "download"}, {}, "assumed"),
        (UNKNOWN, "cuda13.0", {"weights": "mount", "source": f"oci://{MODEL_IMAGE}"}, {}, "assumed"),
        (SMALL, "cuda13.0", {}, {"cold_start_s": 33}, "spec"),
    ],
)
def test_a_cold_start_is_estimated_if_all_sizes_are_known(
    size: ModelSize | UnknownSize, base: str, model: dict[str, Any], deploy: dict[str, Any], starts: str
) -> None:
    found = planned(size, base, model, **deploy)
    assert found.cold_start_s.source.startswith(starts)
    assert found.cold_start_s.value == 33 or found.cold_start_s.value >= 120 + found.load_s.value
    assert found.cold_start_s.value == int(found.cold_start_s.value)


def test_a_node_pulls_a_mounted_image() -> None:
    # 200 MB at 100 MB/s are 2 s more to pull; unpacking takes longer too.
    claim = planned(model={"weights": "mount"}, weights={"pvc": "a"})
    volume = planned(model={"weights": "mount", "source": f"oci://{MODEL_IMAGE}"})
    assert volume.image_start[0].value - claim.image_start[0].value == pytest.approx(2, abs=0.2)
    assert volume.image_start[1].value > claim.image_start[1].value


def test_a_startup_probe_waits_for_a_download() -> None:
    # 20 GB at 100 MB/s: the first start of a pod takes 200 s more than one with the weights in its image.
    large = replace(SMALL, weights_bytes=20_000_000_000)
    baked, loaded = planned(large), planned(large, model={"weights": "download"})
    assert loaded.load_s.value - baked.load_s.value == 200
    assert loaded.startup_failures.value * 5 == 3 * (120 + 200)


# Of 32 GB: 7 s + 32e9 / 250e6 = 135 s.
LARGE = replace(SMALL, weights_bytes=32_000_000_000)


@pytest.mark.parametrize(
    ("size", "base", "deploy", "load", "source", "probe"),
    [
        # 7 s + 200 MB / 250 MB/s. The probe allows what it allowed without an estimate.
        (SMALL, "cuda13.0", {}, 7.8, "estimated", 360),
        (LARGE, "cuda13.0", {}, 135, "estimated", 405),
        (UNKNOWN, "cuda13.0", {}, 120, "assumed", 360),
        (GENERATOR, "vllm-cuda13.0", {}, 120, "assumed", 965),
        (SMALL, "cuda13.0", {"load_s": 20}, 20, "spec", 60),
    ],
)
def test_the_load_is_that_of_check_and_its_estimate_makes_no_probe_stricter(
    size: ModelSize | UnknownSize, base: str, deploy: dict[str, Any], load: float, source: str, probe: int
) -> None:
    found = planned(size, base, **deploy)
    assert found.load_s.value == load
    assert found.load_s.source.startswith(source)
    assert found.startup_failures.value * found.startup_period_s.value == probe
    entry = catalog.base(base)
    spec = Spec.model_validate({"name": "x", "model": {"source": "org/x", "weights": "bake"}, "image": {"base": base}})
    weights = size.weights_bytes if isinstance(size, ModelSize) else None
    parts = cold_start.of_spec(spec, entry, catalog.stack(entry.stack), weights)
    checked = [part.seconds for part in parts if part.name == cold_start.LOAD]
    assert source != "estimated" or checked == [pytest.approx(load)]


@pytest.mark.parametrize(
    ("model", "weights", "way", "names"),
    [
        ({"weights": "mount", "source": f"oci://{MODEL_IMAGE}"}, {}, "image volume", (MODEL_IMAGE, "1.35", "pvc")),
        ({"weights": "mount", "source": "oci://example.com/m"}, {}, "image volume", ("example.com/m:latest", "1.35")),
        ({"weights": "mount"}, {"image": "example.com/m:1"}, "image volume", ("example.com/m:1", "1.35", "bake")),
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
