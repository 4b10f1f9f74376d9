"""How large an image will be, known before it is built. Compressed bytes: what a push sends and a node pulls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inferctl.errors import InferctlError, UsageError

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"total_bytes": self.total, "complete": self.complete, "parts": [vars(part) for part in self.parts]}

    def lines(self) -> list[str]:
        """One line a part, as text."""
        shown = [
            (part.name, size(part.bytes) if part.bytes is not None else "unknown", part.source) for part in self.parts
        ]
        return [f"{name:<28}{bytes_:>10}  {source}" for name, bytes_, source in shown]


# Closures measured as downloads from the public package index; base-images/locks/ pins what they contain.
SERVER_DEPENDENCIES_BYTES = 45_000_000
INT8_BYTES = {True: 60_000_000, False: 4_000_000}
_MEASURED = "measured: wheels of the shipped lock"


def forecast(
    base: BaseImage,
    stack: Stack,
    *,
    locks: tuple[str, ...],
    wheels: Mapping[str, int] | None,
    weights: int | None,
    baked: bool,
    server: int,
) -> Forecast:
    """The size of an image. Pure.

    `locks`: names of the closures that are installed (`torch`, `server`, `int8`). `wheels`: closure -> bytes when a wheel folder
    stands in for the index. `weights`: bytes, None when unknown; counted when `baked`. `server`: bytes of the server's own files.
    """
    folder = "the wheel folder"
    base_source = "; ".join(s.source for s in base.sources if "compressed_bytes" in s.facts)
    parts = [Part("base image", base.compressed_bytes, base_source or base.notes.get("compressed_bytes", "not known"))]
    if "torch" in locks:
        known = "; ".join(s.source for s in stack.sources if "compressed_bytes" in s.facts)
        parts.append(
            Part("torch closure", wheels["torch"], folder)
            if wheels and "torch" in wheels
            else Part("torch closure", stack.compressed_bytes, known if stack.compressed_bytes else "not known")
        )
    if "server" in locks:
        parts.append(
            Part("server dependencies", wheels["server"], folder)
            if wheels and "server" in wheels
            else Part("server dependencies", SERVER_DEPENDENCIES_BYTES, _MEASURED)
        )
    if "int8" in locks:
        parts.append(
            Part("int8 library", wheels["int8"], folder)
            if wheels and "int8" in wheels
            else Part("int8 library", INT8_BYTES[stack.cuda is not None], _MEASURED)
        )
    if baked:
        parts.append(
            Part(
                "weights",
                weights,
                "the model folder" if weights is not None else "a hub model: not known before it is fetched",
            )
        )
    parts.append(Part("server", server, "the installed inferctl, uncompressed"))
    return Forecast(tuple(sorted(parts, key=lambda part: (part.bytes is None, -(part.bytes or 0)))))


def parse_size(text: str) -> int:
    """`6GB`, `800 MiB`, `1.5g` -> bytes. Raises `UsageError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is not a size", "write it like 6GB, 800MB or 2GiB")
    return int(float(found.group(1)) * _UNITS[(found.group(2) or "").lower()])


def size(value: int) -> str:
    """Bytes for people, decimal units: `4.13 GB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}" if factor == 10**9 else f"{value / factor:.1f} {unit}"
    return f"{value} B"


def refuse_larger(found: Forecast, limit: int) -> None:
    """Raise `InferctlError` with the parts, biggest first, when the image would be larger than `limit` bytes."""
    if found.total <= limit:
        return
    least = "" if found.complete else "at least "
    parts = "\n".join(f"  {line}" for line in found.lines())
    raise InferctlError(
        f"the image would be {least}{size(found.total)}, more than the {size(limit)} of --max-size (compressed)\n{parts}",
        _advice(found),
    )


def _advice(found: Forecast) -> str:
    biggest = found.parts[0].name
    return {
        "weights": "mount the weights instead of baking them: model.weights: mount",
        "torch closure": "a CUDA 13 base has a torch closure 1.1-1.4 GB smaller (drivers from R580 on): `inferctl catalog stacks`",
        "base image": "a `-base` tag is the smallest: torch brings its own CUDA libraries; `inferctl catalog bases`",
    }.get(biggest, "raise --max-size, or drop what is biggest")
