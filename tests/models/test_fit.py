"""Tests the findings about a spec, a base, a stack and hardware, with their exact text."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import Any

import pytest

from inferctl.config.spec import Spec
from inferctl.facts import catalog
from inferctl.models import fit

TODAY = datetime.date(2026, 11, 24)
MINILM = fit.ModelSize(
    22_713_216, {"architectures": ["BertModel"], "hidden_size": 384, "intermediate_size": 1536, "vocab_size": 30522}
)
SEVEN_BILLION = fit.ModelSize(
    7_000_000_000,
    {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    },
)


def spec(**sections: Any) -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": "org/model"}, **sections})


def on(part: str | catalog.Hardware, precision: str = "bf16", base: str = "cuda13.0", **options: Any) -> fit.Fit:
    entry = catalog.base(base)
    hardware = catalog.hardware(part) if isinstance(part, str) else part
    options = {"model": MINILM, **options}
    return fit.check_part(spec(serve={"precision": precision}), entry, catalog.stack(entry.stack), hardware, **options)


def image(
    base: str = "cuda13.0", today: datetime.date = TODAY, hub_model: bool = True, **sections: Any
) -> dict[str, fit.Finding]:
    entry = catalog.base(base)
    found = fit.check_image(spec(**sections), entry, catalog.stack(entry.stack), hub_model=hub_model, today=today)
    return {finding.topic: finding for finding in found}


def finding(judged: fit.Fit, topic: str) -> fit.Finding:
    (found,) = [finding for finding in judged.findings if finding.topic == topic]
    return found


@pytest.mark.parametrize(
    ("part", "precision", "base", "topic", "level", "what", "hint"),
    [
        ("t4", "bf16", "cuda13.0", "precision", "warn", "bf16 is emulated", "set serve.precision: fp16, or auto"),
        ("t4", "int8", "cuda13.0", "int8", "ok", "int8 saves memory but not time", "set serve.precision: fp16"),
        ("t4", "fp16", "cpu", "kernels", "error", "", ""),
        ("cpu", "fp32", "cuda13.0", "kernels", "warn", "the image is larger than necessary", ""),
        ("l4", "bf16", "ngc25.12", "kernels", "warn", "unknown whether the stack has kernels", ""),
        (
            *("a10", "bf16", "cuda13.0", "driver", "ok"),
            "needs driver 580 or newer, or R535, R550, R565, R570 or R575 with forward compatibility",
            "i",
        ),
    ],
)
def test_a_finding_says_what_and_how_to_avoid_it(
    part: str, precision: str, base: str, topic: str, level: str, what: str, hint: str
) -> None:
    found = finding(on(part, precision, base), topic)
    assert found.level == level
    assert what in found.what
    assert hint in (found.hint or "")


@pytest.mark.parametrize(
    ("part", "given", "base", "precision", "level", "verdict", "kernels"),
    [
        ("t4", "bf16", "cuda13.0", "bf16", "emulated", "warn", True),
        ("t4", "auto", "cuda13.0", "fp16", "native", "ok", True),
        ("a100-40gb-sxm", "auto", "cuda13.0", "bf16", "native", "ok", True),
        ("l4", "bf16", "ngc25.12", "bf16", "native", "warn", None),
        ("cpu", "fp32", "cpu", "fp32", "native", "ok", True),
        ("cpu", "bf16", "cpu", "bf16", "depends", "warn", True),
        ("cpu", "fp16", "cpu", "fp16", "depends", "warn", True),
        ("cpu", "int8", "cpu", "int8", "depends", "warn", True),
    ],
)
def test_how_a_precision_runs(
    part: str, given: str, base: str, precision: str, level: str, verdict: str, kernels: bool | None
) -> None:
    judged = on(part, given, base)
    assert (judged.precision, judged.level, judged.verdict, judged.kernels) == (precision, level, verdict, kernels)


# No V100 is in the catalog.
VOLTA = dataclasses.replace(catalog.hardware("t4"), key="v100", compute_capability="7.0")


def test_a_precision_that_does_not_run_is_an_error() -> None:
    judged = on(VOLTA, "int8", "cuda12.8")
    assert (judged.verdict, judged.level) == ("error", "unsupported")
    assert finding(judged, "precision").hint == "set serve.precision: fp16"
    assert not [f for f in judged.findings if f.topic == "int8"]


def test_a_stack_without_kernels_for_the_gpu_is_an_error() -> None:
    modern, conservative = on(VOLTA, "fp16", "cuda13.0"), on(VOLTA, "fp16", "cuda12.8")
    assert (modern.verdict, modern.kernels) == ("error", False)
    assert "7.5, 8.0, 8.6, 9.0, 10.0, 12.0 (no PTX)" in finding(modern, "kernels").why
    assert (conservative.verdict, conservative.kernels) == ("ok", True)


def test_memory_is_parameters_times_bytes_plus_one_layer_and_overhead() -> None:
    t4 = catalog.hardware("t4")
    need = fit.memory(MINILM, "bf16", 16384, t4)
    assert need.weights == 22_713_216 * 2
    assert need.activations == 16384 * (5 * 384 + 2 * 1536) * 2
    assert need.overhead == fit.CUDA_OVERHEAD_BYTES
    assert need.total == need.weights + need.activations + need.overhead
    assert fit.memory(MINILM, "fp32", 16384, t4).weights == 22_713_216 * 4
    assert fit.memory(MINILM, "int8", 16384, t4).weights == 22_713_216 + 30522 * 384  # the table keeps 16 bits
    assert fit.memory(MINILM, "fp32", 16384, catalog.hardware("cpu")).overhead == 0


def test_a_model_that_is_too_big_for_a_slice_is_an_error() -> None:
    levels = {"a100-40gb-mig-1g.5gb": "error", "t4": "error", "a100-40gb-mig-3g.20gb": "ok", "l4": "ok"}
    found = {part: finding(on(part, "fp16", model=SEVEN_BILLION), "memory") for part in levels}
    assert {part: each.level for part, each in found.items()} == levels
    assert {("estimated" in each.what, each.why.partition(",")[0]) for each in found.values()} == {
        (True, "weights 14.0 GB")
    }
    assert {each.part for each in found.values()} == {*levels}


def test_memory_is_not_checked_for_a_model_of_unknown_size() -> None:
    judged = on("t4", "fp16", model=fit.UnknownSize("the hub does not respond", "check the network"))
    assert judged.memory is None
    found = finding(judged, "memory")
    assert (found.level, found.what) == ("warn", "memory not checked")
    assert (found.why, found.hint) == ("the hub does not respond", "check the network")


def test_the_load_of_a_slice_is_planned_by_its_compute() -> None:
    half, quarter = on("a100-40gb-mig-3g.20gb"), on("a100-40gb-mig-2g.10gb")
    assert re.findall(r"[\d.]+%", finding(half, "slice").what) == ["38.9%", "50.0%"]
    assert finding(half, "slice").hint
    assert finding(quarter, "slice").hint is None


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc", "0" * 39, "0" * 40])
def test_a_revision_that_is_not_a_commit_is_unpinned(revision: str | None) -> None:
    model = {"source": "org/model", **({"revision": revision} if revision else {})}
    assert "revision" not in image(hub_model=False)
    if revision == "0" * 40:
        assert "revision" not in image(model=model)
        return
    found, baked = (image(model=model | more)["revision"] for more in ({}, {"weights": "bake"}))
    assert found.level == "warn" and (not revision or repr(revision) in found.what)
    assert "--allow-floating" not in (found.hint or "") and "--allow-floating" in (baked.hint or "")


def test_a_base_without_a_digest_is_a_warning_and_a_pinned_mirror_is_not() -> None:
    assert image()["base.digest"].level == "warn"
    mirror = "registry.example.com/cuda"
    assert image(image={"base_image": f"{mirror}:13"})["base.digest"].what.startswith(f"{mirror}:13 ")
    assert "base.digest" not in image(image={"base_image": f"{mirror}@sha256:{'0' * 64}"})


def test_a_near_or_past_end_of_life_is_a_warning() -> None:
    days = TODAY, datetime.date(2028, 2, 1), datetime.date(2028, 6, 30)
    found = [image(today=day)["base.end_of_life"] for day in days]
    assert [end.level for end in found] == ["ok", "warn", "warn"]
    assert len({end.what for end in found}) == 3 and all("2028-06-30" in end.what for end in found)
    assert image(base="ngc25.12")["base.end_of_life"].level == "ok"


def test_a_platform_without_a_lock_is_an_error_without_an_own_lock() -> None:
    assert image(image={"platform": "linux/arm64"})["platform"].level == "error"
    assert "platform" not in image(image={"platform": "linux/arm64", "locks": "mine"})
    assert image(image={"platform": "linux/s390x", "locks": "mine"})["platform"].level == "error"


def test_the_most_severe_finding_decides() -> None:
    levels = [fit.Finding(level, "t", "w", "y") for level in ("ok", "error", "warn")]
    assert (fit.worst(levels), fit.worst(levels[::2]), fit.worst([])) == ("error", "warn", "ok")
