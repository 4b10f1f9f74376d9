"""Tests which driver runs which image on which GPU, and which of the four rules decides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from inferctl.config.spec import Spec
from inferctl.facts import catalog, drivers
from inferctl.facts.drivers import Requirement
from inferctl.models import fit

SPEC = Spec.model_validate({"name": "m", "model": {"source": "org/model"}, "serve": {"precision": "fp16"}})
UNKNOWN = fit.UnknownSize("not read", "read it")
DATA_CENTER = ("t4", "a100-40gb-sxm", "a100-80gb-mig-3g.40gb", "h100-nvl")
GEFORCE = dataclasses.replace(catalog.hardware("l4"), key="rtx-4090", brand="geforcertx")
RTX = dataclasses.replace(catalog.hardware("l40s"), key="rtx-6000-ada", brand="nvidiartx")


def judged(base: str, part: catalog.Hardware, driver: int) -> drivers.DriverVerdict:
    entry = catalog.base(base)
    stack = catalog.stack(entry.stack)
    verdict = fit.judge_driver(entry, stack, catalog.cuda_gpu_of(part), driver)
    assert verdict is not None
    findings = fit.check_part(SPEC, entry, stack, part, UNKNOWN, driver).findings
    (finding,) = (each for each in findings if each.topic == "driver")
    assert (finding.level, finding.what, finding.why) == (verdict.level, verdict.what, verdict.why)
    return verdict


_OF_DATA_CENTER_GPUS = [
    ("cuda12.8", 520, "error", "image"),
    ("cuda12.8", 525, "warn", "image"),  # CUDA 12 runs, and the image starts in CDI mode
    ("cuda12.8", 535, "ok", "stack"),
    ("cuda12.8", 545, "warn", "image"),  # newer than 535, and not listed
    ("cuda12.8", 550, "ok", "stack"),
    ("cuda12.8", 570, "ok", "stack"),
    ("cuda12.8", 575, "ok", "stack"),
    ("cuda12.8", 580, "ok", "stack"),
    ("cuda13.0", 525, "error", "image"),
    ("cuda13.0", 535, "ok", "cuda-compat"),
    ("cuda13.0", 545, "error", "image"),
    ("cuda13.0", 550, "ok", "cuda-compat"),
    ("cuda13.0", 570, "ok", "cuda-compat"),
    ("cuda13.0", 575, "ok", "cuda-compat"),
    ("cuda13.0", 580, "ok", "stack"),
    ("cuda13.0", 615, "ok", "stack"),
    ("ngc25.12", 570, "error", "cuda-compat"),  # the toolkit does not find its cuda-compat
    ("ngc25.12", 580, "ok", "stack"),
]
_OF_OTHERS = [
    (GEFORCE, "cuda12.8", 520, "error", "image"),
    (GEFORCE, "cuda12.8", 535, "warn", "image"),
    (GEFORCE, "cuda12.8", 550, "warn", "image"),
    (GEFORCE, "cuda12.8", 570, "ok", "stack"),
    (GEFORCE, "cuda13.0", 535, "error", "image"),
    (GEFORCE, "cuda13.0", 575, "error", "image"),
    (GEFORCE, "cuda13.0", 580, "ok", "stack"),
    (GEFORCE, "ngc25.12", 570, "error", "cuda-compat"),
    (GEFORCE, "ngc25.12", 580, "ok", "stack"),
    (RTX, "cuda12.8", 535, "ok", "stack"),
    (RTX, "cuda13.0", 550, "warn", "cuda-compat"),  # the image starts; some boards have forward compatibility
    (RTX, "cuda13.0", 580, "ok", "stack"),
    (catalog.hardware("b200-sxm"), "cuda12.8", 535, "error", "gpu"),
    (catalog.hardware("b200-sxm"), "cuda12.8", 565, "error", "gpu"),
    (catalog.hardware("b200-sxm"), "cuda12.8", 570, "ok", "stack"),
    (catalog.hardware("b200-sxm"), "cuda13.0", 535, "error", "gpu"),  # cuda-compat does not replace the kernel module
    (catalog.hardware("b200-sxm"), "cuda13.0", 570, "ok", "cuda-compat"),
    (catalog.hardware("b200-sxm"), "ngc25.12", 550, "error", "gpu"),
    (catalog.hardware("b200-sxm"), "ngc25.12", 580, "ok", "stack"),
    (catalog.hardware("rtx-pro-6000-server"), "cuda12.8", 550, "error", "gpu"),
    (catalog.hardware("rtx-pro-6000-server"), "cuda12.8", 570, "ok", "stack"),
    (catalog.hardware("t4"), "cuda12.8", 470, "error", "image"),
    (catalog.hardware("h100-nvl"), "cuda12.8", 470, "error", "gpu"),
    (catalog.hardware("h100-sxm"), "cuda13.0", 535, "ok", "cuda-compat"),
    (catalog.hardware("a100-40gb-mig-3g.20gb"), "cuda12.8", 440, "error", "gpu"),
]


@pytest.mark.parametrize(
    ("part", "base", "driver", "level", "rule"),
    [*_OF_OTHERS, *((catalog.hardware(part), *row) for part in DATA_CENTER for row in _OF_DATA_CENTER_GPUS)],
)
def test_which_drivers_run_an_image(part: catalog.Hardware, base: str, driver: int, level: str, rule: str) -> None:
    """GeForce cards have no forward compatibility, some RTX boards do. A driver older than the GPU runs no image."""
    verdict = judged(base, part, driver)
    assert (verdict.level, verdict.rule) == (level, rule), verdict
    assert part is not GEFORCE or verdict.level == "ok" or "geforcertx" in verdict.why


def test_every_architecture_has_an_oldest_driver() -> None:
    oldest = {(7, 5): 410, (10, 3): 570, (11, 0): None, (6, 1): None}  # 10.3 is newer than 10.0
    assert {capability: drivers.oldest_driver(capability) for capability in oldest} == oldest


def test_without_a_driver_the_oldest_one_of_the_gpu_is_named() -> None:
    def needs(base: str, part: str) -> str:
        image = catalog.cuda_image(catalog.base(base), catalog.stack(catalog.base(base).stack))
        assert image is not None
        return drivers.describe_drivers(image, catalog.cuda_gpu_of(catalog.hardware(part)))

    assert needs("cuda12.8", "b200-sxm") == "needs driver 570 or newer"
    assert needs("cuda13.0", "b200-sxm") == "needs driver 580 or newer, or R570 or R575 with forward compatibility"
    assert needs("ngc25.12", "t4") == "needs driver 580 or newer"


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"cuda_compat": None}, "error", "has no cuda-compat libraries"),
        ({"require_cuda": "cuda>=9.0"}, "warn", "container toolkit 1.17.5 or newer"),
    ],
)
def test_forward_compatibility_needs_the_libraries_and_the_branch(change: Any, level: str, said: str) -> None:
    base = dataclasses.replace(catalog.base("cuda13.0"), **change)
    verdict = fit.judge_driver(base, catalog.stack(base.stack), drivers.CudaGpu("nvidia"), 550)
    assert verdict is not None
    assert (verdict.level, verdict.rule) == (level, "cuda-compat")
    assert said in f"{verdict.why} {verdict.hint}"


def test_an_image_without_cuda_requires_no_driver() -> None:
    base = catalog.base("cpu")
    assert fit.judge_driver(base, catalog.stack(base.stack), drivers.CudaGpu("nvidia"), 470) is None


def test_a_driver_supports_the_cuda_version_of_its_branch() -> None:
    versions = {525: (12, 0), 540: (12, 2), 580: (13, 0), 700: (13, 5), 1: (0,)}
    assert {branch: drivers.cuda_of_driver(branch) for branch in versions} == versions


@pytest.mark.parametrize(
    ("text", "brand", "driver", "holds"),
    [
        ("cuda>=12.0 driver>=525.60.13", "nvidia", 530, True),
        ("cuda>=13.0,driver>=580", "nvidia", 575, False),
        ("brand!=geforce,driver>=470", "nvidia", 525, True),
        ("brand!=geforce,driver>=470", "geforce", 525, False),
        ("cuda<12.0", "nvidia", 580, False),
        ("cuda=12.8", "nvidia", 570, True),
        ("driver<=535", "nvidia", 535, True),
        ("driver>535", "nvidia", 535, False),
        ("arch>=7.5,cuda>=12.0", "nvidia", 580, True),
    ],
)
def test_a_requirement_is_parsed_as_in_the_container_toolkit(text: str, brand: str, driver: int, holds: bool) -> None:
    held = Requirement.parse(text).satisfied_by(brand, driver, drivers.cuda_of_driver(driver))
    assert (held is not None) == holds


@pytest.mark.parametrize("text", ["cuda", "cuda>=", "gpu>=1", "driver>=new", "brand>=tesla", "cuda>=12.8,"])
def test_an_invalid_requirement_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"condition|invalid literal|can be compared"):
        Requirement.parse(text)


def test_an_unknown_gpu_gets_its_brand_from_its_name() -> None:
    brands = {
        "Tesla T4": "nvidia",
        "NVIDIA A100-SXM4-40GB": "nvidia",
        "NVIDIA GeForce RTX 4090": "geforcertx",
        "NVIDIA GeForce GTX 1080": "geforce",
        "NVIDIA RTX A6000": "nvidiartx",
        "Quadro RTX 5000": "quadrortx",
        "NVIDIA TITAN V": "titan",
    }
    assert {name: drivers.brand_of(name) for name in brands} == brands
