"""Reads the facts about base images, torch stacks, hardware and drivers, each with its source.

The facts are in `base-images/*.yaml` and `benchmarks/hardware/*.yaml`. `fit.py` judges by them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from inferctl.core import assets, document
from inferctl.core.errors import UsageError, did_you_mean
from inferctl.facts import drivers
from inferctl.facts.precision import PRECISIONS, DeviceTraits, capability_of

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The source of `facts` (names of fields): a text with an https link, and the date when it was read.

    `kind`: the facts were read in the source, derived from it (`source` says how), or chosen by inferctl (`source` says
    why).
    """

    facts: tuple[str, ...]
    source: str
    date: datetime.date | None = None
    kind: Literal["read", "derived", "own-choice"] = "read"

    @property
    def title(self) -> str:
        """The text of `source` before its first link."""
        return re.split(r":? \(?https://", self.source, maxsplit=1)[0]


@dataclass(frozen=True)
class PythonInstall:
    """The Python of a base: `major.minor`, its path, and the apt packages to install (none if the base has it)."""

    version: str
    executable: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class BaseImage:
    """A base image. `ships` are its CUDA libraries, `provides` its Python packages. `notes` explain null facts.

    `packages`: apt packages that its stack needs at run time, in addition to Python.
    `require_cuda` is NVIDIA_REQUIRE_CUDA of the image. `cuda_compat` is the CUDA version of its forward compatibility
    libraries.
    """

    key: str
    description: str
    reference: str
    digest: str | None
    distribution: str
    cuda: str | None
    python: PythonInstall
    constraints: str | None
    ships: tuple[str, ...]
    provides: tuple[str, ...]
    driver_floor: int | None
    compressed_bytes: int | None
    end_of_life: datetime.date | None
    stack: str
    platforms: tuple[str, ...]
    notes: Mapping[str, str]
    sources: tuple[Source, ...]
    packages: tuple[str, ...] = ()
    require_cuda: str | None = None
    cuda_compat: str | None = None

    def __post_init__(self) -> None:
        _ = self.requirement

    @property
    def requirement(self) -> drivers.Requirement | None:
        """`require_cuda`, parsed. None if the image has none or it is unknown."""
        return drivers.Requirement.parse(self.require_cuda) if self.require_cuda else None


@dataclass(frozen=True)
class Stack:
    """One combination of torch, CUDA, Python, GPU kernels and driver.

    `driver_floor` is the oldest driver branch, such as 580. `sm` are the compute capabilities with compiled kernels.
    `index`: URL of the package index of its torch, None for PyPI. `vllm`: requirement of vLLM, such as `vllm==0.33.0`,
    None for a stack of embeddings. `vllm_bytes`: size of the download of vLLM and its dependencies, without torch.
    """

    key: str
    torch: str
    cuda: str | None
    python: tuple[str, ...]
    sm: tuple[str, ...]
    sm_complete: bool
    ptx: bool | None
    driver_floor: int | None
    compressed_bytes: int | None
    platforms: tuple[str, ...]
    sources: tuple[Source, ...]
    default_for: tuple[str, ...] = ()
    index: str | None = None
    vllm: str | None = None
    vllm_bytes: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sm in self.sm:
            capability_of(sm)

    def has_kernels(self, capability: tuple[int, int]) -> bool | None:
        """Return whether the wheel has kernels for `capability`; None if the known list is incomplete.

        A kernel for X.y runs on X.z with z >= y (CUDA binary compatibility). PTX runs on every newer GPU.
        """
        built = [capability_of(sm) for sm in self.sm]
        if any(major == capability[0] and minor <= capability[1] for major, minor in built):
            return True
        if self.ptx and any(target <= capability for target in built):
            return True
        return False if self.sm_complete and self.ptx is not None else None


@dataclass(frozen=True)
class Price:
    """On-demand price of one device in US dollars per hour: the price of an instance divided by its devices."""

    provider: str
    instance: str
    usd_per_hour: float
    source: str
    date: datetime.date


@dataclass(frozen=True)
class MigSlice:
    """A MIG instance. `at_most` is the maximum number of such instances on one GPU."""

    profile: str
    parent: str
    sms: int
    parent_sms: int
    memory_fraction: float
    at_most: int

    @property
    def compute_share(self) -> float:
        """Share of the multiprocessors of the GPU, such as 42 of 108 for 3g."""
        return self.sms / self.parent_sms


@dataclass(frozen=True)
class Hardware:
    """A GPU, a MIG slice or a CPU. Peaks are dense, in TFLOP/s (int8: TOP/s); None if unknown.

    `brand` is the name of the GPU's brand in NVIDIA_REQUIRE_CUDA, such as `nvidia` or `geforce`.
    """

    key: str
    name: str
    kind: Literal["cuda", "cpu"]
    compute_capability: str | None
    peaks: Mapping[str, float | None]
    memory_bytes: int | None
    bandwidth_gbs: float | None
    tdp_watts: int | None
    sm_count: int | None
    device_names: tuple[str, ...]
    labels: Mapping[str, str]
    prices: tuple[Price, ...]
    notes: Mapping[str, str]
    sources: tuple[Source, ...]
    mig: MigSlice | None = None
    brand: str | None = None

    def __post_init__(self) -> None:
        if missing := set(PRECISIONS) - set(self.peaks):
            raise ValueError(f"peaks lack {', '.join(sorted(missing))} (write null for an unknown peak)")
        if (self.kind == "cuda") != (self.compute_capability is not None):
            raise ValueError("compute_capability is required for kind cuda and not allowed for other kinds")
        _ = self.traits

    @property
    def traits(self) -> DeviceTraits:
        """The argument of `precision.support`. A CPU profile has no instruction flags: they differ by machine."""
        return DeviceTraits(self.kind, capability_of(self.compute_capability) if self.compute_capability else None)

    @property
    def parts(self) -> int:
        """How many such devices one GPU makes, among which its price is divided: 1 for a whole GPU.

        All slices of a GPU are equal, as the GPU Operator makes them (`all-3g.20gb`), so what does not fit another one
        is paid too: a 4g of an A100 costs the whole GPU, although it has 4 of 7 parts.
        """
        return self.mig.at_most if self.mig else 1


# Files in base-images/ that do not describe a base image.
_TABLES = ("drivers", "stacks")


@cache
def bases() -> dict[str, BaseImage]:
    """Return all base images by key."""
    return {key: _base(file) for key, file in _base_files().items()}


def _base_files() -> dict[str, Path]:
    files = sorted((assets.root() / "base-images").glob("*.yaml"))
    return {file.stem: file for file in files if file.stem not in _TABLES}


@cache
def stacks() -> dict[str, Stack]:
    """Return all torch stacks by key, oldest first."""
    file = assets.root() / "base-images" / "stacks.yaml"
    table = _yaml(file)
    return {key: _typed(Stack, {"key": key, **table["defaults"], **row}, file) for key, row in table["stacks"].items()}


def vllm_versions() -> set[str]:
    """Return the versions of vLLM in the locks; none in an image, which has no catalog, and its own lock's version."""
    if not (assets.root() / "base-images").is_dir():
        return set()
    return {stack.vllm.partition("==")[2] for stack in stacks().values() if stack.vllm}


def cuda_image(base: BaseImage, stack: Stack) -> drivers.CudaImage | None:
    """Return the facts of a base and its stack that `drivers.judge` requires; None for images without CUDA."""
    if stack.cuda is None or stack.driver_floor is None:
        return None
    image = drivers.CudaImage(base.key, base.requirement, base.cuda_compat, stack.cuda, stack.driver_floor)
    note = base.notes.get("cuda_compat")
    return replace(image, no_compat=note) if note else image


def cuda_gpu_of(part: Hardware) -> drivers.CudaGpu:
    """Return the facts of a part of kind cuda that `drivers.judge` requires."""
    return drivers.cuda_gpu(part.brand or drivers.brand_of(part.name), part.compute_capability)


@cache
def hardware_profiles() -> dict[str, Hardware]:
    """Return all hardware by key. The MIG slices of a GPU follow the GPU."""
    found: dict[str, Hardware] = {}
    for file in sorted((assets.root() / "benchmarks" / "hardware").glob("*.yaml")):
        found |= _parts(file)
    return found


def base(key: str) -> BaseImage:
    """Return the base image `key`, or read it from the file `key` if that ends in .yaml. Raises `UsageError`."""
    if key.endswith((".yaml", ".yml")):
        return _base(Path(key))
    return _find("base image", key, bases())


def check_task(task: str, base: BaseImage, stack: Stack) -> None:
    """Raise `UsageError` if images on `base` cannot serve `task`: only generation runs on vLLM. `auto`: not known."""
    generation = stack.vllm is not None
    if task == "auto" or (task == "generate") == generation:
        return
    bases_for = [each.key for each in bases().values() if (stacks()[each.stack].vllm is None) == generation]
    needs = "is without vLLM, which generation runs on" if task == "generate" else f"is for generation, not for {task}"
    raise UsageError(f"the base {base.key} {needs}", f"set image.base to one of {', '.join(bases_for)}")


def stack(key: str) -> Stack:
    """Return the stack `key`. Raises `UsageError`."""
    return _find("stack", key, stacks())


def hardware(key: str) -> Hardware:
    """Return the hardware `key`, or read it from the file `key` if that ends in .yaml. Raises `UsageError`."""
    if key.endswith((".yaml", ".yml")):
        file = Path(key)
        data = _yaml(file)
        data.pop("slices", None)
        return _typed(Hardware, {"key": file.stem, **data}, file)
    return _find("hardware", key, hardware_profiles())


def vocabulary() -> dict[str, list[str]]:
    """Return the known names by dotted path of the spec, for `settings.resolve`."""
    return {"hardware": list(hardware_profiles()), "image.base": list(bases())}


def detect_gpu(name: str, memory_bytes: int | None = None) -> Hardware | None:
    """Return the hardware with a device name of NVML or torch, such as `NVIDIA A100-SXM4-40GB MIG 3g.20gb`.

    None if the catalog has no such device, or if `memory_bytes` differs from its memory by more than 15%.
    """
    normalized = _device_name(name)
    for part in hardware_profiles().values():
        if normalized not in map(_device_name, part.device_names):
            continue
        if memory_bytes and part.memory_bytes and abs(memory_bytes / part.memory_bytes - 1) > 0.15:
            continue
        return part
    return None


def _device_name(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold()).removeprefix("nvidia ")


def _find(what: str, key: str, known: Mapping[str, T]) -> T:
    if key in known:
        return known[key]
    hint = did_you_mean(key, known) or f"known: {', '.join(known)}"
    raise UsageError(f"{what} {key!r} not found", hint)


def _base(file: Path) -> BaseImage:
    """Return the base image in `file`. `based_on`: key of a built-in base whose other facts and sources apply."""
    data = _yaml(file)
    if (key := data.pop("based_on", None)) is not None:
        parent = _yaml(_find("base image", str(key), _base_files()))
        own = {fact for source in data.get("sources", ()) for fact in source["facts"]}
        inherited = [{**s, "facts": [f for f in s["facts"] if f not in own]} for s in parent["sources"]]
        notes = {**parent.get("notes", {}), **data.get("notes", {})}
        sources = [*data.get("sources", ()), *(s for s in inherited if s["facts"])]
        data = {**parent, **data, "notes": notes, "sources": sources}
    return _typed(BaseImage, {"key": file.stem, **data}, file)


def _parts(file: Path) -> dict[str, Hardware]:
    data = _yaml(file)
    slices = data.pop("slices", None)
    whole = _typed(Hardware, {"key": file.stem, **data}, file)
    parts = {whole.key: whole}
    for row in slices["table"] if slices else []:
        mig = _typed(MigSlice, {"parent": whole.key, "parent_sms": whole.sm_count, **row}, file)
        part = _slice(whole, mig, f"{slices['prefix']}-mig-{mig.profile}", slices["device_names"], slices["source"])
        parts[part.key] = part
    return parts


def _slice(whole: Hardware, mig: MigSlice, key: str, device_names: list[str], source: Mapping[str, Any]) -> Hardware:
    """Derive a MIG slice from its GPU: peaks by its share of the multiprocessors, bandwidth by that of the memory."""
    if not (whole.memory_bytes and whole.bandwidth_gbs):
        raise UsageError(f"{whole.key} has slices but no memory_bytes or bandwidth_gbs")
    share = mig.compute_share
    labels = {**whole.labels, "cloud.google.com/gke-gpu-partition-size": mig.profile}
    labels["nvidia.com/gpu.product"] += f"-MIG-{mig.profile}"
    return Hardware(
        key=key,
        name=f"{whole.name}, MIG {mig.profile}",
        kind=whole.kind,
        compute_capability=whole.compute_capability,
        peaks={precision: None if peak is None else peak * share for precision, peak in whole.peaks.items()},
        memory_bytes=int(whole.memory_bytes * mig.memory_fraction),
        bandwidth_gbs=whole.bandwidth_gbs * mig.memory_fraction,
        tdp_watts=None,
        sm_count=mig.sms,
        device_names=tuple(f"{name} MIG {mig.profile}" for name in device_names),
        labels=labels,
        prices=(),
        brand=whole.brand,
        notes={
            "peaks": f"derived: {mig.sms} of {mig.parent_sms} multiprocessors of {whole.key}",
            "labels": "gpu.product as set by the single strategy of the MIG manager",
            "bandwidth_gbs": "derived: proportional to the memory share, a common assumption, not measured",
            "tdp_watts": "a slice has no power limit of its own",
            "prices": f"sold as a share of {whole.key}",
        },
        sources=(Source(("mig", "sm_count", "memory_bytes"), source["source"], source["date"]), *whole.sources),
        mig=mig,
    )


def _yaml(file: Path) -> dict[str, Any]:
    return document.read(file, "use a built-in entry as a template: `inferctl catalog` lists them").data


def _typed(kind: type[T], data: dict[str, Any], file: Path) -> T:
    """Return `data` as the dataclass `kind`. Raises `UsageError` with all invalid and unknown fields."""
    from pydantic import TypeAdapter, ValidationError

    unknown = sorted(set(data) - set(kind.__dataclass_fields__))  # type: ignore[attr-defined]  # kind is a dataclass
    try:
        entry = TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UsageError(f"{file}: " + "; ".join(problems), "use a built-in entry as a template") from None
    if unknown:
        raise UsageError(f"{file}: unknown keys {', '.join(unknown)}", "use a built-in entry as a template")
    return entry
