"""Whether an NVIDIA driver runs a CUDA image on a GPU: oldest driver, image's requirement, compatibility."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Brands that NVIDIA's data-center parts report to the container toolkit. T4: `Tesla` or `NVIDIA`, by driver.
DATA_CENTER = frozenset({"tesla", "nvidia"})
# Brands of which some boards have forward compatibility ("select NGC Server Ready SKUs of RTX cards").
SOMETIMES = frozenset({"nvidiartx", "quadro", "quadrortx"})

_CONDITION = re.compile(r"(cuda|driver|brand|arch)(>=|<=|!=|=|>|<)([\w.]+)")
# The container toolkit that enables cuda-compat by default again: 1.17.4 did not
# (https://github.com/NVIDIA/nvidia-container-toolkit/pull/906).
TOOLKIT = "container toolkit 1.17.5 or newer"
Rule = Literal["gpu", "image", "stack", "cuda-compat"]


@dataclass(frozen=True)
class Condition:
    """One comparison of `NVIDIA_REQUIRE_CUDA`, as in `driver>=535`."""

    subject: str
    operator: str
    value: str

    def holds(self, actual: str | tuple[int, ...]) -> bool:
        """Whether `actual` (a brand, or a version) satisfies it."""
        if isinstance(actual, str):
            return (actual == self.value) == (self.operator == "=")
        wanted = version(self.value)
        width = max(len(actual), len(wanted))
        a, b = (v + (0,) * (width - len(v)) for v in (actual, wanted))
        return {">=": a >= b, "<=": a <= b, "=": a == b, "!=": a != b, ">": a > b, "<": a < b}[self.operator]


@dataclass(frozen=True)
class Requirement:
    """A parsed `NVIDIA_REQUIRE_CUDA`: any alternative suffices, and all conditions of an alternative must hold."""

    alternatives: tuple[tuple[Condition, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Spaces separate alternatives, commas the conditions of one. Raises `ValueError`."""
        return cls(tuple(tuple(map(_condition, alternative.split(","))) for alternative in text.split()))

    def satisfied_by(self, brand: str, driver: int, cuda: tuple[int, ...]) -> tuple[Condition, ...] | None:
        """The alternative that holds, one about CUDA before one about drivers; None when the image is refused."""
        actual: Mapping[str, str | tuple[int, ...]] = {"brand": brand, "driver": (driver,), "cuda": cuda}
        held = [
            alternative
            for alternative in self.alternatives
            # `arch` depends on the GPU; no image of the catalog uses it, and a base of your own may.
            if all(c.subject == "arch" or c.holds(actual[c.subject]) for c in alternative)
        ]
        return next((a for a in held if not _names_driver(a)), held[0] if held else None)

    @property
    def cuda(self) -> str | None:
        """The CUDA version that a driver must offer where no driver branch is listed: `13.0`."""
        return next((a[0].value for a in self.alternatives if len(a) == 1 and a[0].subject == "cuda"), None)

    def branches(self, brand: str) -> tuple[int, ...]:
        """Driver branches that are listed for `brand` although their CUDA is older."""
        found = set()
        for alternative in self.alternatives:
            brands = {c.value for c in alternative if c.subject == "brand"}
            if brand in brands or not brands:
                found |= {version(c.value)[0] for c in alternative if c.subject == "driver" and c.operator == ">="}
        return tuple(sorted(found))

    def describe(self) -> str:
        """For people, on one line."""
        listed: dict[tuple[int, ...], list[str]] = {}
        for brand in dict.fromkeys(c.value for a in self.alternatives for c in a if c.subject == "brand"):
            listed.setdefault(self.branches(brand), []).append(brand)
        rows = [f"{_named(branches)} for brands {', '.join(brands)}" for branches, brands in listed.items()]
        return "; or ".join([*([f"CUDA {self.cuda} or newer"] if self.cuda else []), *rows])


@dataclass(frozen=True)
class Verdict:
    """Whether a driver runs an image on a part, by which rule. `level` is that of a finding."""

    level: Literal["ok", "warn", "error"]
    rule: Rule
    what: str
    why: str
    hint: str | None = None


@dataclass(frozen=True)
class Image:
    """What of a base and its stack decides. `requirement`: None when it has none or it is not known.

    `compat`: CUDA version of the forward compatibility libraries that the container toolkit enables, None when there
    are none; `no_compat` says why. `cuda`, `floor`: the stack's CUDA version and oldest driver branch.
    """

    name: str
    requirement: Requirement | None
    compat: str | None
    cuda: str
    floor: int
    no_compat: str = "it has no cuda-compat libraries"


@dataclass(frozen=True)
class Gpu:
    """What of a GPU decides: its brand, its compute capability and the oldest driver branch that runs it.

    `capability` and `oldest_driver` are None when they are not known.
    """

    brand: str
    capability: str | None = None
    oldest_driver: int | None = None


def judge(image: Image, gpu: Gpu, driver: int, cuda: tuple[int, ...]) -> Verdict:
    """Whether `driver` (a branch, as in 535, which offers CUDA `cuda`) runs `image` on `gpu`.

    Four rules in this order: the oldest driver of the GPU; the container toolkit starts the image only if
    `NVIDIA_REQUIRE_CUDA` holds, except in CDI mode; CUDA's minor version compatibility; the forward compatibility
    libraries in the image.
    """
    if gpu.oldest_driver and driver < gpu.oldest_driver:
        return _too_old_for_the_gpu(gpu, gpu.oldest_driver, driver)
    brand = gpu.brand
    held: tuple[Condition, ...] | None = ()
    if image.requirement:
        held = image.requirement.satisfied_by(brand, driver, cuda)
    if held is None and image.requirement:
        return _refused(image, image.requirement, brand, driver, cuda)
    family = f"CUDA {image.cuda.split('.')[0]}"
    if driver >= image.floor:
        why = f"{family} runs on driver {image.floor} or newer (minor version compatibility)"
        return Verdict("ok", "stack", f"driver {driver} is new enough", why)
    needs = f"{family} needs driver {image.floor} or newer, or forward compatibility"
    upgrade = f"upgrade the nodes to R{image.floor}, or take a base that needs less: `inferctl catalog bases`"
    if brand not in DATA_CENTER | SOMETIMES:
        why = f"{needs}; forward compatibility exists for data-center GPUs, and this one is of brand {brand}"
        return Verdict("error", "cuda-compat", f"driver {driver} is too old", why, upgrade)
    if not image.compat:
        why = f"{needs}, and {image.name} cannot use it: {image.no_compat}"
        return Verdict("error", "cuda-compat", f"driver {driver} is too old", why, upgrade)
    carries = f"{image.name} carries cuda-compat for CUDA {image.compat}"
    if not _names_driver(held):
        why = f"{needs}; {carries}, but the image does not list the branches that it supports"
        hint = f"try it there with {TOOLKIT}, or upgrade the nodes to R{image.floor}"
        return Verdict("warn", "cuda-compat", f"driver {driver} may be too old", why, hint)
    if brand in SOMETIMES:
        why = f"{carries}; only some RTX boards have forward compatibility"
        hint = f"try it there with {TOOLKIT}, or upgrade the nodes to R{image.floor}"
        return Verdict("warn", "cuda-compat", f"driver {driver} may be too old", why, hint)
    why = f"{carries}, and NVIDIA_REQUIRE_CUDA lists R{driver} for this data-center GPU"
    hint = f"use {TOOLKIT} on the nodes: 1.17.4 does not enable cuda-compat by default"
    return Verdict("ok", "cuda-compat", f"driver {driver} works through forward compatibility", why, hint)


def needs(image: Image, gpu: Gpu) -> str:
    """Which drivers run `image` on `gpu`, for people."""
    oldest = gpu.oldest_driver or 0
    least = f"needs driver {max(image.floor, oldest)} or newer"
    branches = image.requirement.branches(gpu.brand) if image.requirement else ()
    older = tuple(b for b in branches if oldest <= b < image.floor)
    if gpu.brand in DATA_CENTER and image.compat and older:
        return f"{least}, or {_named(older)} with forward compatibility"
    return least


def version(text: str) -> tuple[int, ...]:
    """`"12.8"` -> `(12, 8)`. Raises `ValueError`."""
    return tuple(int(part) for part in text.split("."))


def brand_of(name: str) -> str:
    """The brand of a GPU by its device name, for one that the catalog does not know."""
    words = name.casefold()
    if "geforce" in words:
        return "geforcertx" if "rtx" in words else "geforce"
    if "titan" in words:
        return "titan"
    if "quadro" in words:
        return "quadrortx" if "rtx" in words else "quadro"
    return "nvidiartx" if "rtx" in words else "nvidia"


def _too_old_for_the_gpu(gpu: Gpu, oldest: int, driver: int) -> Verdict:
    why = f"GPUs of compute capability {gpu.capability} need driver {oldest} or newer in every image"
    why += "; cuda-compat replaces the libraries of the driver, not its kernel module"
    return Verdict("error", "gpu", f"driver {driver} is older than the GPU", why, f"upgrade the nodes to R{oldest}")


def _refused(image: Image, requirement: Requirement, brand: str, driver: int, cuda: tuple[int, ...]) -> Verdict:
    has = f"driver {driver} offers CUDA {'.'.join(map(str, cuda))}"
    listed = requirement.branches(brand)
    instead = f" or, for brand {brand}, {_named(listed)}" if listed else f" and lists no branch for brand {brand}"
    why = f"NVIDIA_REQUIRE_CUDA of {image.name} asks for CUDA {requirement.cuda} or newer{instead}; {has}"
    what = f"the container toolkit refuses the image on driver {driver}"
    hint = "upgrade the nodes, or take a base that needs less: `inferctl catalog bases`"
    if driver < image.floor:
        return Verdict("error", "image", what, why, hint)
    # CDI mode does not check NVIDIA_REQUIRE_*: https://github.com/NVIDIA/nvidia-container-toolkit/issues/1470
    why += f", which runs CUDA {image.cuda.split('.')[0]} (minor version compatibility)"
    hint = f"use CDI mode, {hint}"
    return Verdict("warn", "image", f"{what} unless it runs in CDI mode", why, hint)


def _condition(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no condition like driver>=535")
    condition = Condition(*found.groups())
    if condition.subject != "brand":
        version(condition.value)
    elif condition.operator not in ("=", "!="):
        raise ValueError(f"{text!r} compares a brand by size")
    return condition


def _names_driver(alternative: tuple[Condition, ...] | None) -> bool:
    return any(condition.subject == "driver" for condition in alternative or ())


def _named(branches: tuple[int, ...]) -> str:
    names = [f"R{branch}" for branch in branches]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}" if names else "no branch"
