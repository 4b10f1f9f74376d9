"""Estimates how long a new node takes to pull and unpack an image and to load its model, from the sizes of parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.config.spec import Spec
from inferctl.core.errors import InferctlError
from inferctl.core.sizes import size
from inferctl.facts.catalog import BaseImage, Stack
from inferctl.image import locks, size_forecast
from inferctl.image.size_forecast import ImagePart, SizeForecast
from inferctl.models import image_source

# Uncompressed bytes per compressed byte (gzip), measured: Debian with Python, the closures of the CPU image, torch 2.15
# with its CUDA 13.2 libraries. Weights hardly compress.
_GROWTH = {"base image": 2.5, "torch closure": 3.6, "server dependencies": 3.4}
_CUDA_GROWTH, _OTHER_GROWTH = 1.7, 1.0
# From a registry or a hub, assumed.
_PULL_BYTES_PER_S = 100e6
# Uncompressed bytes per second that an engine unpacks. Measured: a CPU image of 1.3 GB pulled from a registry on the
# same machine, in CPU seconds of Docker Engine 26 with the containerd store. Disks and newer CPUs differ.
_UNPACK_BYTES_PER_S = {"gzip": 75e6, "zstd": 110e6}
# A start of the server for embeddings, reranking and classification: imports, and the comparison with fp32. Measured:
# CPU seconds of all-MiniLM-L6-v2 in a container. The weights are read twice, from a disk of 500 MB/s.
_SERVER_S, _READ_BYTES_PER_S = 7.0, 250e6
LOAD = "load and warm-up"


@dataclass(frozen=True)
class StartPart:
    """One part of a cold start. `formula` has the numbers of its estimate."""

    name: str
    seconds: float
    formula: str

    def document(self) -> dict[str, Any]:
        """Return the part as JSON data."""
        return vars(self)


def of_image(compressed: int, uncompressed: int, method: str) -> tuple[StartPart, StartPart]:
    """Return pull and unpack of an image with known sizes in bytes."""
    unpack = _UNPACK_BYTES_PER_S[method]
    return (
        StartPart("pull", compressed / _PULL_BYTES_PER_S, f"{size(compressed)} / {_rate(_PULL_BYTES_PER_S)}"),
        StartPart("unpack", uncompressed / unpack, f"{size(uncompressed)} / {_rate(unpack)}, {method}"),
    )


def load(weights: int) -> StartPart:
    """Return load and warm-up of `weights` bytes by the server for embeddings, reranking and classification."""
    formula = f"{_SERVER_S:g} s + {size(weights)} / {_rate(_READ_BYTES_PER_S)}"
    return StartPart(LOAD, _SERVER_S + weights / _READ_BYTES_PER_S, formula)


def of_spec(spec: Spec, base: BaseImage, stack: Stack, weights: int | None) -> tuple[StartPart, ...]:
    """Return the estimated parts of a cold start of the image of `spec`. Empty if a size is unknown.

    `weights`: bytes of the weights, None if unknown. A model image that Kubernetes mounts is pulled and unpacked too.
    The load of vLLM depends on too much to be estimated here.
    """
    mounted = image_source.volume(spec) is not None
    if weights is None and (mounted or spec.model.weights == "download"):
        return ()
    try:
        forecast = _forecast(spec, base, stack, weights)
    except InferctlError:  # `inferctl check` reports locks that do not fit
        return ()
    if not forecast.complete:
        return ()
    volume = weights if mounted and weights else 0
    uncompressed = volume + sum((part.bytes or 0) * _growth(part, stack) for part in forecast.parts)
    parts: list[StartPart] = [*of_image(forecast.total + volume, round(uncompressed), "gzip")]
    if weights and spec.model.weights == "download":
        download = weights / _PULL_BYTES_PER_S
        parts.append(StartPart("download", download, f"{size(weights)} / {_rate(_PULL_BYTES_PER_S)}"))
    if weights is not None and stack.vllm is None:
        parts.append(load(weights))
    return tuple(parts)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:g} MB/s"


def _forecast(spec: Spec, base: BaseImage, stack: Stack, weights: int | None) -> SizeForecast:
    folder = Path(spec.image.locks) if spec.image.locks else None
    found = locks.load(base, folder, int8=spec.serve.precision == "int8")
    names = tuple(Path(name).stem for name, text in found.files().items() if b"==" in text)
    baked = ImagePart("weights", weights, "") if spec.model.weights == "bake" else None
    return size_forecast.forecast(base, stack, locks=names, weights=baked, server=0)


def _growth(part: ImagePart, stack: Stack) -> float:
    if stack.cuda and part.name in ("torch closure", "vLLM closure", "int8 library"):
        return _CUDA_GROWTH
    return _GROWTH.get(part.name, _OTHER_GROWTH)
