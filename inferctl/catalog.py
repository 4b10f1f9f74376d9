"""What is known of base images, torch stacks and hardware; which precision runs where, and why not.

Facts are data (`base-images/*.yaml`, `benchmarks/hardware/*.yaml`), each with its source; decisions are the functions here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Level = Literal["native", "emulated", "unsupported"]


@dataclass(frozen=True)
class Traits:
    """What decides which precisions a device runs: `cuda` with a compute capability, or `cpu` with its instruction flags."""

    kind: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None = None
    cpu_flags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Support:
    """How a precision runs on a device, with the reason in one line."""

    level: Level
    reason: str


def support(precision: str, device: Traits) -> Support:
    """Whether `device` runs `precision` natively, emulates it or cannot; the one place that decides it."""
    if precision == "fp32":
        return Support("native", "fp32 runs everywhere")
    return _cuda_support(precision, device.compute_capability or (0, 0)) if device.kind == "cuda" else _cpu_support(precision, device.cpu_flags)


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
        return Support("native", f"{sm} runs LLM.int8; it halves the weights' memory and is slower than fp16 where it was measured")
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
        return Support("native", f"the CPU has {', '.join(found)}")
    return Support("emulated", "the CPU has no VNNI or AMX instructions: int8 saves memory, not time")


def vocabulary() -> dict[str, list[str]]:
    """Dotted paths of the spec -> the names that are known there, for `spec.resolve`."""
    return {}
