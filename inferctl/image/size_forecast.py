"""Forecasts the size of an image before it is built, in compressed bytes, as pushed and pulled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
_MEASURED = "measured: wheels of the shipped lock and their bytecode"


def forecast(
    base: BaseImage,
    stack: Stack,
    *,
    locks: tuple[str, ...],
    weights: ImagePart | None,
    server: int,
    base_image: str | None = None,
) -> SizeForecast:
    """Return the forecast size of an image. Pure function.

    `locks`: names of the installed closures (`torch`, `vllm`, `server`, `int8`), which count with gzip; zstd is
    smaller. `weights`: the baked weights. `server`: bytes of the server's own files. `base_image`: the image that
    replaces `base`. Its size is not known here, so that of `base` counts.
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
            parts.append(ImagePart(name, None if known is None else known + BYTECODE_BYTES[lock], source))
    if weights is not None:
        parts.append(weights)
    parts.append(ImagePart("server", server, "the installed inferctl, uncompressed"))
    return SizeForecast(tuple(sorted(parts, key=lambda part: (part.bytes is None, -(part.bytes or 0)))))


def _titles(stack: Stack, fact: str = "compressed_bytes") -> str:
    facts = [source.title for source in stack.sources if fact in source.facts]
    return "; ".join(facts) if getattr(stack, fact) else "unknown"
