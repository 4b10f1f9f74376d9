"""Forecasts the size of an image before it is built, in compressed bytes, as pushed and pulled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.core.sizes import size
from inferctl.facts.catalog import BaseImage, Stack


@dataclass(frozen=True)
class ImagePart:
    """One part of an image. `bytes` is None if unknown. `source` names the source of the figure."""

    name: str
    bytes: int | None
    source: str


@dataclass(frozen=True)
class SizeForecast:
    """The forecast size of an image: its parts, largest first, with unknown sizes last."""

    parts: tuple[ImagePart, ...]

    @property
    def total(self) -> int:
        """Sum of the known parts in bytes."""
        return sum(part.bytes or 0 for part in self.parts)

    @property
    def complete(self) -> bool:
        """Whether all sizes are known; otherwise `total` is a lower bound."""
        return all(part.bytes is not None for part in self.parts)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the parts with an unknown size."""
        return tuple(part.name for part in self.parts if part.bytes is None)

    def document(self) -> dict[str, Any]:
        """Return the forecast as JSON data."""
        return {"total_bytes": self.total, "complete": self.complete, "parts": [vars(part) for part in self.parts]}

    def lines(self) -> list[str]:
        """Return one line of text per part."""
        shown = [
            (part.name, size(part.bytes) if part.bytes is not None else "unknown", part.source) for part in self.parts
        ]
        return [f"{name:<28}{bytes_:>10}  {source}" for name, bytes_, source in shown]


# Size of the wheels in the shipped locks: of the server closure, and of int8 (bitsandbytes, on CUDA stacks only).
SERVER_WHEELS_BYTES = 49_000_000
INT8_WHEELS_BYTES = 43_100_000
# Compressed size of a layer minus the size of its wheels: bytecode (for a fast start) minus removed files.
# Measured on the CPU base: layers of 183.6 and 74.9 MB from wheels of 167.8 and 49.6 MB.
BYTECODE_BYTES = {"torch": 15_900_000, "server": 25_400_000, "int8": 2_000_000, "vllm": 0}
# Size of a layer with zstd, relative to gzip, rounded up. Measured at the level of `image/compression.py` on the layers
# of the CPU image (torch 0.83, server 0.72), and on torch 2.15 with its CUDA 13.2 libraries (0.88, by `zstd -7`).
ZSTD_SHARE = {"torch": 0.89, "server": 0.73, "int8": 0.89, "vllm": 0.89}
_MEASURED = "measured: wheels of the shipped lock and their bytecode"


def forecast(
    base: BaseImage,
    stack: Stack,
    *,
    locks: tuple[str, ...],
    wheels: Mapping[str, int] | None,
    weights: ImagePart | None,
    server: int,
    zstd: bool = False,
    base_image: str | None = None,
) -> SizeForecast:
    """Return the forecast size of an image. Pure function.

    `locks`: names of the installed closures (`torch`, `vllm`, `server`, `int8`). `wheels`: closure -> bytes, if a wheel
    folder replaces the index. `weights`: the baked weights. `server`: bytes of the server's own files. `zstd`: whether
    all layers get zstd; otherwise they count with gzip, which is larger. `base_image`: the image that replaces `base`.
    Its size is not known here, so that of `base` counts.
    """
    base_source = "; ".join(s.title for s in base.sources if "compressed_bytes" in s.facts)
    base_source = base_source or base.notes.get("compressed_bytes", "unknown")
    if base_image and base_image.partition("@")[0] != base.reference:
        base_source = f"{base.reference}, in place of image.base_image: {base_source}"
    parts = [ImagePart("base image", base.compressed_bytes, base_source)]
    closures = {
        "torch": ("torch closure", stack.compressed_bytes, _titles(stack)),
        "vllm": ("vLLM closure", stack.vllm_bytes, _titles(stack, "vllm_bytes")),
        "server": ("server dependencies", SERVER_WHEELS_BYTES, _MEASURED),
        "int8": ("int8 library", INT8_WHEELS_BYTES, _MEASURED),
    }
    for lock, (name, known, source) in closures.items():
        if lock in locks:
            parts.append(_closure(name, lock, known, source, wheels, zstd))
    if weights is not None:
        parts.append(weights)
    parts.append(ImagePart("server", server, "the installed inferctl, uncompressed"))
    return SizeForecast(tuple(sorted(parts, key=lambda part: (part.bytes is None, -(part.bytes or 0)))))


def _titles(stack: Stack, fact: str = "compressed_bytes") -> str:
    facts = [source.title for source in stack.sources if fact in source.facts]
    return "; ".join(facts) if getattr(stack, fact) else "unknown"


def _closure(
    name: str, lock: str, known: int | None, source: str, wheels: Mapping[str, int] | None, zstd: bool
) -> ImagePart:
    download = wheels[lock] if wheels and lock in wheels else known
    source_text = "the wheel folder and bytecode" if wheels and lock in wheels else source
    if download is None:
        return ImagePart(name, None, source_text)
    share = ZSTD_SHARE[lock] if zstd else 1.0
    return ImagePart(name, round((download + BYTECODE_BYTES[lock]) * share), source_text)


def check_limit(found: SizeForecast, limit: int, cuda: str | None = None) -> None:
    """Raise `InferctlError` with the parts, largest first, if the forecast exceeds `limit` bytes.

    `cuda`: CUDA version of its torch, for the hint.
    """
    if found.total <= limit:
        return
    minimum = "" if found.complete else "at least "
    parts = "\n".join(f"  {line}" for line in found.lines())
    raise InferctlError(
        f"forecast image size {minimum}{size(found.total)} exceeds image.max_size {size(limit)} (compressed)\n{parts}",
        _advice(found, cuda),
    )


def _advice(found: SizeForecast, cuda: str | None) -> str:
    largest = found.parts[0].name
    if largest == "weights":
        return "set model.weights: mount to leave the weights out of the image"
    if largest == "torch closure" and cuda is not None and cuda.startswith("12."):
        return "select a CUDA 13 base: its torch closure is 1.1 to 1.4 GB smaller (requires driver R580 or newer)"
    if largest == "base image":
        return "select a `-base` tag, because torch has its own CUDA libraries: `inferctl catalog bases`"
    return "raise image.max_size (`--max-size`), or reduce the largest part"
