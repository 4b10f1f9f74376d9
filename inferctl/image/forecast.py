"""How large an image will be, known before it is built. Compressed bytes: what a push sends and a node pulls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inferctl.errors import InferctlError
from inferctl.sizes import size

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack


@dataclass(frozen=True)
class Part:
    """One part of the image; `bytes` is None when nobody knows. `source` says where the figure comes from."""

    name: str
    bytes: int | None
    source: str


@dataclass(frozen=True)
class Forecast:
    """The parts, biggest first, those of unknown size last."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Sum of the known parts, bytes."""
        return sum(part.bytes or 0 for part in self.parts)

    @property
    def complete(self) -> bool:
        """Whether every part is known; otherwise `total` is a lower bound."""
        return all(part.bytes is not None for part in self.parts)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the parts whose size nobody knows."""
        return tuple(part.name for part in self.parts if part.bytes is None)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"total_bytes": self.total, "complete": self.complete, "parts": [vars(part) for part in self.parts]}

    def lines(self) -> list[str]:
        """One line a part, as text."""
        shown = [
            (part.name, size(part.bytes) if part.bytes is not None else "unknown", part.source) for part in self.parts
        ]
        return [f"{name:<28}{bytes_:>10}  {source}" for name, bytes_, source in shown]


# Wheels of the server closure as base-images/locks/ pins it; of int8 (bitsandbytes; CPU stacks need nothing).
SERVER_WHEELS_BYTES = 49_000_000
INT8_WHEELS_BYTES = 43_100_000
# What a layer weighs in a registry beyond its wheels: bytecode, which lets a server start fast, less what is removed.
# Measured on the CPU base: layers of 183.6 and 74.9 MB out of wheels of 167.8 and 49.6 MB.
BYTECODE_BYTES = {"torch": 15_900_000, "server": 25_400_000, "int8": 2_000_000}
_MEASURED = "measured: the wheels of the shipped lock, and their bytecode"


def forecast(
    base: BaseImage,
    stack: Stack,
    *,
    locks: tuple[str, ...],
    wheels: Mapping[str, int] | None,
    weights: Part | None,
    server: int,
) -> Forecast:
    """The size of an image. Pure.

    `locks`: names of the closures that are installed (`torch`, `server`, `int8`). `wheels`: closure -> bytes when a wheel folder
    stands in for the index. `weights`: those that the image bakes. `server`: bytes of the server's own files.
    """
    base_source = "; ".join(s.title for s in base.sources if "compressed_bytes" in s.facts)
    parts = [Part("base image", base.compressed_bytes, base_source or base.notes.get("compressed_bytes", "not known"))]
    if "torch" in locks:
        facts = [s.title for s in stack.sources if "compressed_bytes" in s.facts]
        known = "; ".join(facts) if stack.compressed_bytes else "not known"
        parts.append(_closure("torch closure", "torch", stack.compressed_bytes, known, wheels))
    if "server" in locks:
        parts.append(_closure("server dependencies", "server", SERVER_WHEELS_BYTES, _MEASURED, wheels))
    if "int8" in locks:
        parts.append(_closure("int8 library", "int8", INT8_WHEELS_BYTES, _MEASURED, wheels))
    if weights is not None:
        parts.append(weights)
    parts.append(Part("server", server, "the installed inferctl, uncompressed"))
    return Forecast(tuple(sorted(parts, key=lambda part: (part.bytes is None, -(part.bytes or 0)))))


def _closure(name: str, lock: str, known: int | None, source: str, wheels: Mapping[str, int] | None) -> Part:
    download = wheels[lock] if wheels and lock in wheels else known
    where = "the wheel folder, and bytecode" if wheels and lock in wheels else source
    return Part(name, download + BYTECODE_BYTES[lock] if download is not None else None, where)


def refuse_larger(found: Forecast, limit: int, cuda: str | None = None) -> None:
    """Raise `InferctlError` with the parts, biggest first, when the image would be larger than `limit` bytes.

    `cuda`: the CUDA of its torch, for the advice.
    """
    if found.total <= limit:
        return
    least = "" if found.complete else "at least "
    parts = "\n".join(f"  {line}" for line in found.lines())
    raise InferctlError(
        f"the image would be {least}{size(found.total)}, more than the {size(limit)} of --max-size (compressed)\n{parts}",
        _advice(found, cuda),
    )


def _advice(found: Forecast, cuda: str | None) -> str:
    biggest = found.parts[0].name
    if biggest == "weights":
        return "mount the weights instead of baking them: model.weights: mount"
    if biggest == "torch closure" and cuda is not None and cuda.startswith("12."):
        return "a CUDA 13 base has a torch closure 1.1-1.4 GB smaller (drivers from R580 on): `inferctl catalog stacks`"
    if biggest == "base image":
        return "a `-base` tag is the smallest, torch brings its own CUDA libraries: `inferctl catalog bases`"
    return "raise --max-size, or drop what is biggest"
