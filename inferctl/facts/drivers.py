"""Determines whether an NVIDIA driver runs a CUDA image on a GPU.

The rules are the oldest driver of the GPU, the requirement of the image, and CUDA's minor and forward compatibility.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from inferctl.core import assets, document
from inferctl.facts.precision import capability_of

# Brands that data-center GPUs report to the container toolkit. A T4 reports `Tesla` or `NVIDIA`, by driver.
DATA_CENTER = frozenset({"tesla", "nvidia"})
# Brands with forward compatibility on some boards only ("select NGC Server Ready SKUs of RTX cards").
PARTLY_SUPPORTED = frozenset({"nvidiartx", "quadro", "quadrortx"})

_CONDITION = re.compile(r"(cuda|driver|brand|arch)(>=|<=|!=|=|>|<)([\w.]+)")
# The container toolkit 1.17.4 does not enable cuda-compat by default
# (https://github.com/NVIDIA/nvidia-container-toolkit/pull/906).
TOOLKIT = "container toolkit 1.17.5 or newer"
Rule = Literal["gpu", "image", "stack", "cuda-compat"]


@dataclass(frozen=True)
class Condition:
    """One comparison of `NVIDIA_REQUIRE_CUDA`, such as `driver>=535`."""

    subject: str
    operator: str
    value: str

    def satisfied_by(self, actual: str | tuple[int, ...]) -> bool:
        """Return whether `actual` (a brand or a version) satisfies the condition."""
        if isinstance(actual, str):
            return (actual == self.value) == (self.operator == "=")
        required = version(self.value)
        width = max(len(actual), len(required))
        a, b = (v + (0,) * (width - len(v)) for v in (actual, required))
        return {">=": a >= b, "<=": a <= b, "=": a == b, "!=": a != b, ">": a > b, "<": a < b}[self.operator]


@dataclass(frozen=True)
class Requirement:
    """A parsed `NVIDIA_REQUIRE_CUDA`: at least one alternative must satisfy all of its conditions."""

    alternatives: tuple[tuple[Condition, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Parse alternatives separated by spaces, each with conditions separated by commas. Raises `ValueError`."""
        return cls(tuple(tuple(map(_condition, alternative.split(","))) for alternative in text.split()))

    def satisfied_by(self, brand: str, driver: int, cuda: tuple[int, ...]) -> tuple[Condition, ...] | None:
        """Return the alternative that this GPU and driver satisfy, or None if the toolkit rejects the image.

        An alternative without a driver condition is preferred.
        """
        actual: Mapping[str, str | tuple[int, ...]] = {"brand": brand, "driver": (driver,), "cuda": cuda}
        satisfied = [
            alternative
            for alternative in self.alternatives
            # `arch` is not checked: no image in the catalog uses it. A base image of a user may.
            if all(c.subject == "arch" or c.satisfied_by(actual[c.subject]) for c in alternative)
        ]
        return next((a for a in satisfied if not _names_driver(a)), satisfied[0] if satisfied else None)

    @property
    def cuda(self) -> str | None:
        """CUDA version that a driver of an unlisted branch must support, such as `13.0`."""
        return next((a[0].value for a in self.alternatives if len(a) == 1 and a[0].subject == "cuda"), None)

    def branches(self, brand: str) -> tuple[int, ...]:
        """Return the driver branches that are listed for `brand`: they may support an older CUDA version only."""
        found = set()
        for alternative in self.alternatives:
            brands = {c.value for c in alternative if c.subject == "brand"}
            if brand in brands or not brands:
                found |= {version(c.value)[0] for c in alternative if c.subject == "driver" and c.operator == ">="}
        return tuple(sorted(found))


@dataclass(frozen=True)
class DriverVerdict:
    """Whether a driver runs an image on a GPU, and the rule that decides it. `level` is the level of a finding."""

    level: Literal["ok", "warn", "error"]
    rule: Rule
    what: str
    why: str
    hint: str | None = None


@dataclass(frozen=True)
class CudaImage:
    """The facts of a base image and its stack that decide which drivers run it.

    `requirement`: None if the image has none or it is unknown. `compat`: CUDA version of the forward compatibility
    libraries that the container toolkit enables; None if there are none, with the reason in `no_compat`. `cuda` and
    `floor`: CUDA version and oldest driver branch of the stack.
    """

    name: str
    requirement: Requirement | None
    compat: str | None
    cuda: str
    floor: int
    no_compat: str = "it has no cuda-compat libraries"


@dataclass(frozen=True)
class CudaGpu:
    """The facts of a GPU that decide which drivers run it.

    `capability` (compute capability) and `oldest_driver` (driver branch) are None if unknown.
    """

    brand: str
    capability: str | None = None
    oldest_driver: int | None = None


def judge(image: CudaImage, gpu: CudaGpu, driver: int, cuda: tuple[int, ...]) -> DriverVerdict:
    """Return whether the driver branch `driver` (such as 535), which supports CUDA `cuda`, runs `image` on `gpu`.

    Four rules apply in this order:
    1. The driver is not older than the oldest driver of the GPU.
    2. The container toolkit starts the image only if `NVIDIA_REQUIRE_CUDA` is satisfied, except in CDI mode.
    3. CUDA's minor version compatibility.
    4. The forward compatibility libraries in the image.
    """
    if gpu.oldest_driver and driver < gpu.oldest_driver:
        return _too_old_for_the_gpu(gpu, gpu.oldest_driver, driver)
    brand = gpu.brand
    satisfied: tuple[Condition, ...] | None = ()
    if image.requirement:
        satisfied = image.requirement.satisfied_by(brand, driver, cuda)
    if satisfied is None and image.requirement:
        return _rejected(image, image.requirement, brand, driver, cuda)
    family = f"CUDA {image.cuda.split('.')[0]}"
    if driver >= image.floor:
        why = f"{family} runs on driver {image.floor} or newer (minor version compatibility)"
        return DriverVerdict("ok", "stack", f"driver {driver} is new enough", why)
    needs = f"{family} needs driver {image.floor} or newer, or forward compatibility"
    upgrade = f"upgrade the nodes to R{image.floor}, or select a base for older drivers: `inferctl catalog bases`"
    if brand not in DATA_CENTER | PARTLY_SUPPORTED:
        why = f"{needs}; only data-center GPUs have forward compatibility, and this GPU has the brand {brand}"
        return DriverVerdict("error", "cuda-compat", f"driver {driver} is too old", why, upgrade)
    if not image.compat:
        why = f"{needs}; {image.name} cannot use forward compatibility: {image.no_compat}"
        return DriverVerdict("error", "cuda-compat", f"driver {driver} is too old", why, upgrade)
    libraries = f"{image.name} contains cuda-compat for CUDA {image.compat}"
    if not _names_driver(satisfied):
        why = f"{needs}; {libraries}, but the image does not list the driver branches that it supports"
        hint = f"test it on a node with {TOOLKIT}, or upgrade the nodes to R{image.floor}"
        return DriverVerdict("warn", "cuda-compat", f"driver {driver} may be too old", why, hint)
    if brand in PARTLY_SUPPORTED:
        why = f"{libraries}; only some RTX boards have forward compatibility"
        hint = f"test it on a node with {TOOLKIT}, or upgrade the nodes to R{image.floor}"
        return DriverVerdict("warn", "cuda-compat", f"driver {driver} may be too old", why, hint)
    why = f"{libraries}, and NVIDIA_REQUIRE_CUDA lists R{driver} for this data-center GPU"
    hint = f"use {TOOLKIT} on the nodes: 1.17.4 does not enable cuda-compat by default"
    return DriverVerdict("ok", "cuda-compat", f"driver {driver} works through forward compatibility", why, hint)


def describe_drivers(image: CudaImage, gpu: CudaGpu) -> str:
    """Return one line of text that says which drivers run `image` on `gpu`."""
    oldest = gpu.oldest_driver or 0
    minimum = f"needs driver {max(image.floor, oldest)} or newer"
    branches = image.requirement.branches(gpu.brand) if image.requirement else ()
    older = tuple(b for b in branches if oldest <= b < image.floor)
    if gpu.brand in DATA_CENTER and image.compat and older:
        return f"{minimum}, or {_branch_names(older)} with forward compatibility"
    return minimum


def version(text: str) -> tuple[int, ...]:
    """Parse a version: `"12.8"` -> `(12, 8)`. Raises `ValueError`."""
    return tuple(int(part) for part in text.split("."))


def brand_of(name: str) -> str:
    """Return the brand of a GPU that is not in the catalog, from its device name."""
    words = name.casefold()
    if "geforce" in words:
        return "geforcertx" if "rtx" in words else "geforce"
    if "titan" in words:
        return "titan"
    if "quadro" in words:
        return "quadrortx" if "rtx" in words else "quadro"
    return "nvidiartx" if "rtx" in words else "nvidia"


def _too_old_for_the_gpu(gpu: CudaGpu, oldest: int, driver: int) -> DriverVerdict:
    why = f"GPUs of compute capability {gpu.capability} need driver {oldest} or newer in every image"
    why += "; cuda-compat replaces the libraries of the driver but not its kernel module"
    return DriverVerdict(
        "error", "gpu", f"driver {driver} is older than the GPU", why, f"upgrade the nodes to R{oldest}"
    )


def _rejected(
    image: CudaImage, requirement: Requirement, brand: str, driver: int, cuda: tuple[int, ...]
) -> DriverVerdict:
    has = f"driver {driver} supports CUDA {'.'.join(map(str, cuda))}"
    listed = requirement.branches(brand)
    instead = f" or, for brand {brand}, {_branch_names(listed)}" if listed else f" and lists no branch for {brand}"
    why = f"NVIDIA_REQUIRE_CUDA of {image.name} requires CUDA {requirement.cuda} or newer{instead}; {has}"
    what = f"the container toolkit rejects the image on driver {driver}"
    hint = "upgrade the nodes, or select a base for older drivers: `inferctl catalog bases`"
    if driver < image.floor:
        return DriverVerdict("error", "image", what, why, hint)
    # CDI mode does not check NVIDIA_REQUIRE_*: https://github.com/NVIDIA/nvidia-container-toolkit/issues/1470
    why += f", which runs CUDA {image.cuda.split('.')[0]} (minor version compatibility)"
    hint = f"use CDI mode, {hint}"
    return DriverVerdict("warn", "image", f"{what} unless it runs in CDI mode", why, hint)


def _condition(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a condition such as driver>=535")
    condition = Condition(*found.groups())
    if condition.subject != "brand":
        version(condition.value)
    elif condition.operator not in ("=", "!="):
        raise ValueError(f"{text!r}: a brand can be compared with = and != only")
    return condition


def _names_driver(alternative: tuple[Condition, ...] | None) -> bool:
    return any(condition.subject == "driver" for condition in alternative or ())


def _branch_names(branches: tuple[int, ...]) -> str:
    names = [f"R{branch}" for branch in branches]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}" if names else "no branch"


def cuda_gpu(brand: str, capability: str | None) -> CudaGpu:
    """Return the facts of a GPU that `judge` requires, from its brand and compute capability."""
    oldest = oldest_driver(capability_of(capability)) if capability else None
    return CudaGpu(brand, capability, oldest)


def oldest_driver(capability: tuple[int, int]) -> int | None:
    """Return the oldest driver branch that runs GPUs of `capability`; None if unknown.

    A capability that is not in the table gets the branch of the next lower one with the same major version. Its GPUs
    may need a newer driver.
    """
    known = {capability_of(key): branch for key, branch in _driver_table()["oldest_driver"].items()}
    earlier = [branch for (major, minor), branch in known.items() if major == capability[0] and minor <= capability[1]]
    return max((branch for branch in earlier if branch), default=None)


def cuda_of_driver(branch: int) -> tuple[int, ...]:
    """Return the newest CUDA version that a driver branch supports without cuda-compat: 535 -> (12, 2)."""
    known = _driver_branches()
    older = [version for since, version in known.items() if since <= branch]
    return version(older[-1]) if older else (0,)


@cache
def _driver_branches() -> dict[int, str]:
    return dict(sorted(_driver_table()["cuda"].items()))


@cache
def _driver_table() -> dict[str, Any]:
    file = assets.root() / "base-images" / "drivers.yaml"
    return document.read(file, "it is part of inferctl").data
