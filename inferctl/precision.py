"""Determines how a device runs a precision: natively, emulated or not at all.

This is the only place that decides it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Level = Literal["native", "emulated", "unsupported"]


@dataclass(frozen=True)
class DeviceTraits:
    """The facts that decide which precisions run: compute capability of a GPU, or instruction flags of a CPU."""

    kind: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None = None
    cpu_flags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Support:
    """How a device runs a precision, with the reason in one line."""

    level: Level
    reason: str


def capability_of(text: str) -> tuple[int, int]:
    """Parse a compute capability: `"8.6"` -> `(8, 6)`. Raises `ValueError`."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"{text!r} is not a compute capability such as 8.6")
    return int(major), int(minor)


def support(precision: str, device: DeviceTraits) -> Support:
    """Return whether `device` runs `precision` natively, emulates it or does not support it."""
    if precision == "fp32":
        return Support("native", "fp32 runs everywhere")
    if device.kind == "cuda":
        return _cuda_support(precision, device.compute_capability or (0, 0))
    return _cpu_support(precision, device.cpu_flags)


def best_precision(device: DeviceTraits) -> str:
    """Return what `auto` selects on `device`: bf16 if native, else fp16 if native on a GPU, else fp32."""
    if support("bf16", device).level == "native":
        return "bf16"
    return "fp16" if device.kind == "cuda" and support("fp16", device).level == "native" else "fp32"


def _cuda_support(precision: str, capability: tuple[int, int]) -> Support:
    sm = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16":
        if capability >= (8, 0):
            return Support("native", f"{sm} has bf16 tensor cores (8.0 or newer)")
        return Support("emulated", f"{sm} has no bf16 tensor cores (requires 8.0 or newer): use fp16")
    if precision == "fp16":
        if capability >= (7, 0):
            return Support("native", f"{sm} has fp16 tensor cores")
        return Support("emulated", f"{sm} has no fp16 tensor cores (requires 7.0 or newer)")
    if capability >= (7, 5):
        return Support("native", f"{sm} runs LLM.int8: half the weight memory; slower than fp16 in every measurement")
    return Support("unsupported", f"{sm} does not support LLM.int8 of bitsandbytes (requires 7.5 or newer)")


def _cpu_support(precision: str, flags: frozenset[str]) -> Support:
    if precision == "bf16":
        found = sorted(flags & {"avx512_bf16", "amx_bf16"})
        if found:
            return Support("native", f"the CPU has {', '.join(found)}")
        return Support("emulated", "the CPU has no avx512_bf16 or amx_bf16 instructions: bf16 is slower than fp32")
    if precision == "fp16":
        if flags & {"avx512_fp16", "amx_fp16"}:
            return Support("native", "the CPU has fp16 arithmetic")
        return Support("emulated", "the CPU has no fp16 arithmetic: fp16 is many times slower than fp32")
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    if found:
        return Support(
            "native",
            f"the CPU has {', '.join(found)}: half the weight memory; slower than bf16 on short texts only",
        )
    return Support("emulated", "the CPU has no VNNI or AMX instructions: int8 saves memory but not time")
