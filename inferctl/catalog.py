"""What is known of base images, torch stacks and hardware, and which precision runs where.

Facts are data (`base-images/*.yaml`, `benchmarks/hardware/*.yaml`), each with its source; `inferctl.fit` judges.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from inferctl import assets, document, drivers
from inferctl.errors import UsageError, did_you_mean

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Level = Literal["native", "emulated", "unsupported"]
T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """What decides which precisions run: `cuda` with a compute capability, or `cpu` with its instruction flags."""

    kind: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None = None
    cpu_flags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Support:
    """How a precision runs on a device, with the reason in one line."""

    level: Level
    reason: str


@dataclass(frozen=True)
class Source:
    """Where `facts` (names of fields) come from: a text with an https link, and the day of reading.

    `kind`: read in the source, derived from what it says (`source` names how), or a choice of inferctl (`source`: why).
    """

    facts: tuple[str, ...]
    source: str
    date: datetime.date | None = None
    kind: Literal["read", "derived", "own-choice"] = "read"

    @property
    def title(self) -> str:
        """`source` up to its first link."""
        return re.split(r":? \(?https://", self.source, maxsplit=1)[0]


@dataclass(frozen=True)
class PythonInstall:
    """The Python of a base: `major.minor`, its path, and the apt packages that bring it (none when it is there)."""

    version: str
    executable: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class BaseImage:
    """A container base. `ships` are its CUDA libraries, `provides` its Python packages; `notes` explain null facts.

    `require_cuda` is the image's NVIDIA_REQUIRE_CUDA, `cuda_compat` the CUDA version of its forward compatibility
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
    require_cuda: str | None = None
    cuda_compat: str | None = None

    def __post_init__(self) -> None:
        _ = self.requirement

    @property
    def requirement(self) -> drivers.Requirement | None:
        """`require_cuda`, parsed; None when the image has none or it is not known."""
        return drivers.Requirement.parse(self.require_cuda) if self.require_cuda else None


@dataclass(frozen=True)
class Stack:
    """One row torch x CUDA x Python x kernels x driver. `driver_floor` is the major driver version, as in 580.

    `index`: URL of the package index that has its torch, None when that is PyPI.
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
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sm in self.sm:
            capability_of(sm)

    def has_kernels(self, capability: tuple[int, int]) -> bool | None:
        """Whether compiled code in the wheel runs on `capability`; None when the known list is not complete.

        A kernel built for X.y runs on X.z with z >= y (CUDA binary compatibility); PTX runs on anything newer.
        """
        built = [capability_of(sm) for sm in self.sm]
        if any(major == capability[0] and minor <= capability[1] for major, minor in built):
            return True
        if self.ptx and any(target <= capability for target in built):
            return True
        return False if self.sm_complete and self.ptx is not None else None


@dataclass(frozen=True)
class Price:
    """On-demand price of one such device, US dollars an hour, out of an instance's price divided by its devices."""

    provider: str
    instance: str
    usd_per_hour: float
    source: str
    date: datetime.date


@dataclass(frozen=True)
class MigSlice:
    """A MIG instance: its multiprocessors and those of the whole GPU, its share of the memory, how many fit one GPU."""

    profile: str
    parent: str
    sms: int
    parent_sms: int
    memory_fraction: float
    at_most: int

    @property
    def compute_share(self) -> float:
        """Share of the whole GPU's multiprocessors: 42 of 108 for 3g."""
        return self.sms / self.parent_sms


@dataclass(frozen=True)
class Hardware:
    """A GPU, a slice of one, or a CPU. Peaks are dense, in TFLOP/s (int8: TOP/s), None where none is known.

    `brand` is the GPU's brand in the words of NVIDIA_REQUIRE_CUDA, such as `nvidia` or `geforce`.
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
            raise ValueError(f"peaks lack {', '.join(sorted(missing))} (null says that none is known)")
        if (self.kind == "cuda") != (self.compute_capability is not None):
            raise ValueError("compute_capability goes with kind cuda, and only with it")
        _ = self.traits

    @property
    def traits(self) -> Traits:
        """What `support` asks; the instruction flags of a CPU are the running machine's, so a profile has none."""
        return Traits(self.kind, capability_of(self.compute_capability) if self.compute_capability else None)


def capability_of(text: str) -> tuple[int, int]:
    """`"8.6"` -> `(8, 6)`. Raises `ValueError`."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"{text!r} is not a compute capability like 8.6")
    return int(major), int(minor)


def support(precision: str, device: Traits) -> Support:
    """Whether `device` runs `precision` natively, emulates it or cannot; the one place that decides it."""
    if precision == "fp32":
        return Support("native", "fp32 runs everywhere")
    if device.kind == "cuda":
        return _cuda_support(precision, device.compute_capability or (0, 0))
    return _cpu_support(precision, device.cpu_flags)


def best_precision(device: Traits) -> str:
    """What `auto` means on `device`: bf16 where it is native, else fp16 where a GPU runs it natively, else fp32."""
    if support("bf16", device).level == "native":
        return "bf16"
    return "fp16" if device.kind == "cuda" and support("fp16", device).level == "native" else "fp32"


def _cuda_support(precision: str, capability: tuple[int, int]) -> Support:
    sm = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16":
        if capability >= (8, 0):
            return Support("native", f"{sm} has bf16 tensor cores (8.0 or newer)")
        return Support("emulated", f"{sm} has no bf16 tensor cores (8.0 or newer needed): use fp16")
    if precision == "fp16":
        if capability >= (7, 0):
            return Support("native", f"{sm} has fp16 tensor cores")
        return Support("emulated", f"{sm} has no fp16 tensor cores (7.0 or newer needed)")
    if capability >= (7, 5):
        return Support("native", f"{sm} runs LLM.int8: half the weights' memory, slower than fp16 wherever measured")
    return Support("unsupported", f"{sm} is below 7.5, which bitsandbytes' LLM.int8 needs")


def _cpu_support(precision: str, flags: frozenset[str]) -> Support:
    if precision == "bf16":
        found = sorted(flags & {"avx512_bf16", "amx_bf16"})
        if found:
            return Support("native", f"the CPU has {', '.join(found)}")
        return Support("emulated", "the CPU has neither avx512_bf16 nor amx_bf16: expect bf16 to be slower than fp32")
    if precision == "fp16":
        if flags & {"avx512_fp16", "amx_fp16"}:
            return Support("native", "the CPU has fp16 arithmetic")
        return Support("emulated", "the CPU has no fp16 arithmetic: expect fp16 to be many times slower than fp32")
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    if found:
        return Support(
            "native",
            f"the CPU has {', '.join(found)}: it halves the weights' memory; slower than bf16 on short texts, level on longer",
        )
    return Support("emulated", "the CPU has no VNNI or AMX instructions: int8 saves memory, not time")


# Files of base-images/ that are no base.
_TABLES = ("drivers", "stacks")


@cache
def bases() -> dict[str, BaseImage]:
    """Every base image, by key."""
    files = sorted((assets.root() / "base-images").glob("*.yaml"))
    return {f.stem: _typed(BaseImage, {"key": f.stem, **_yaml(f)}, f) for f in files if f.stem not in _TABLES}


@cache
def stacks() -> dict[str, Stack]:
    """Every known torch stack, by key, oldest first."""
    file = assets.root() / "base-images" / "stacks.yaml"
    table = _yaml(file)
    return {key: _typed(Stack, {"key": key, **table["defaults"], **row}, file) for key, row in table["stacks"].items()}


def image_of(base: BaseImage, stack: Stack) -> drivers.Image | None:
    """What of a base and its stack a driver must satisfy; None for images without CUDA."""
    if stack.cuda is None or stack.driver_floor is None:
        return None
    image = drivers.Image(base.key, base.requirement, base.cuda_compat, stack.cuda, stack.driver_floor)
    note = base.notes.get("cuda_compat")
    return replace(image, no_compat=note) if note else image


def gpu_of(part: Hardware) -> drivers.Gpu:
    """What of a part a driver must satisfy. `part` is of kind cuda."""
    return gpu(part.brand or drivers.brand_of(part.name), part.compute_capability)


def gpu(brand: str, capability: str | None) -> drivers.Gpu:
    """What of a GPU a driver must satisfy."""
    oldest = oldest_driver(capability_of(capability)) if capability else None
    return drivers.Gpu(brand, capability, oldest)


def oldest_driver(capability: tuple[int, int]) -> int | None:
    """The oldest driver branch that runs GPUs of `capability`, at least; None when it is not known.

    A capability that the table does not have needs no older driver than the one before it of the same major version.
    """
    known = {capability_of(key): branch for key, branch in _driver_table()["oldest_driver"].items()}
    earlier = [branch for (major, minor), branch in known.items() if major == capability[0] and minor <= capability[1]]
    return max((branch for branch in earlier if branch), default=None)


def cuda_of_driver(branch: int) -> tuple[int, ...]:
    """The newest CUDA version that a driver of this branch offers by itself: 535 -> (12, 2)."""
    known = _driver_branches()
    older = [version for since, version in known.items() if since <= branch]
    return drivers.version(older[-1]) if older else (0,)


@cache
def _driver_branches() -> dict[int, str]:
    return dict(sorted(_driver_table()["cuda"].items()))


@cache
def _driver_table() -> dict[str, Any]:
    return _yaml(assets.root() / "base-images" / "drivers.yaml")


@cache
def hardware_profiles() -> dict[str, Hardware]:
    """Every part, and after each the MIG slices derived from it, by key."""
    found: dict[str, Hardware] = {}
    for file in sorted((assets.root() / "benchmarks" / "hardware").glob("*.yaml")):
        found |= _parts(file)
    return found


def base(key: str) -> BaseImage:
    """The base `key`, or the one described in the file `key` when it ends in .yaml. Raises `UsageError`."""
    if key.endswith((".yaml", ".yml")):
        file = Path(key)
        return _typed(BaseImage, {"key": file.stem, **_yaml(file)}, file)
    return _pick("base image", key, bases())


def stack(key: str) -> Stack:
    """The stack `key`. Raises `UsageError`."""
    return _pick("stack", key, stacks())


def hardware(key: str) -> Hardware:
    """The part or slice `key`, or the one described in the file `key` when it ends in .yaml. Raises `UsageError`."""
    if key.endswith((".yaml", ".yml")):
        file = Path(key)
        data = _yaml(file)
        data.pop("slices", None)
        return _typed(Hardware, {"key": file.stem, **data}, file)
    return _pick("hardware", key, hardware_profiles())


def vocabulary() -> dict[str, list[str]]:
    """Dotted paths of the spec -> the names that are known there, for `settings.resolve`."""
    plans = sorted(file.stem for file in (assets.root() / "benchmarks" / "plans").glob("*.yaml"))
    known = {"hardware": list(hardware_profiles()), "image.base": list(bases())}
    return known | ({"bench.plan": plans} if plans else {})


def detect_gpu(name: str, memory_bytes: int | None = None) -> Hardware | None:
    """The profile of a device by the name NVML or torch gives it, as in `NVIDIA A100-SXM4-40GB MIG 3g.20gb`.

    None when nothing in the catalog is that device, or when `memory_bytes` is more than 15 % off what the profile says.
    """
    wanted = _device_name(name)
    for part in hardware_profiles().values():
        if wanted not in map(_device_name, part.device_names):
            continue
        if memory_bytes and part.memory_bytes and abs(memory_bytes / part.memory_bytes - 1) > 0.15:
            continue
        return part
    return None


def _device_name(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold()).removeprefix("nvidia ")


def _pick(what: str, key: str, known: Mapping[str, T]) -> T:
    if key in known:
        return known[key]
    hint = did_you_mean(key, known) or f"known: {', '.join(known)}"
    raise UsageError(f"there is no {what} {key!r}", hint)


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
    """A slice out of its GPU: peaks by its share of the multiprocessors, bandwidth by its share of the memory."""
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
            "labels": "gpu.product as the single strategy of the MIG manager sets it",
            "bandwidth_gbs": "derived: proportional to the memory share, the usual reading, not measured",
            "tdp_watts": "a slice has no power limit of its own",
            "prices": f"sold as a share of {whole.key}",
        },
        sources=(Source(("mig", "sm_count", "memory_bytes"), source["source"], source["date"]), *whole.sources),
        mig=mig,
    )


def _yaml(file: Path) -> dict[str, Any]:
    return document.read(file, "`inferctl catalog` lists what is built in: take an entry as a pattern").data


def _typed(kind: type[T], data: dict[str, Any], file: Path) -> T:
    """`data` as the dataclass `kind`; every wrong or unknown field is named in the `UsageError`."""
    from pydantic import TypeAdapter, ValidationError

    unknown = sorted(set(data) - set(kind.__dataclass_fields__))  # type: ignore[attr-defined]  # kind is a dataclass
    try:
        entry = TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UsageError(f"{file}: " + "; ".join(mistakes), "take one of the built-in entries as a pattern") from None
    if unknown:
        raise UsageError(f"{file}: unknown {', '.join(unknown)}", "take one of the built-in entries as a pattern")
    return entry
