"""Compares the catalog facts about a base image with the facts of its registry. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inferctl.core.sizes import size
from inferctl.facts.catalog import BaseImage
from inferctl.facts.drivers import Requirement
from inferctl.image.buildx import RemoteImage

# Rebuilds with newer distribution packages change the size of a base by a few percent.
SIZE_TOLERANCE = 0.15


@dataclass(frozen=True)
class BaseComparison:
    """The comparison of one fact.

    `unrecorded`: the catalog does not have the fact. `unknown`: the registry did not respond.
    """

    base: str
    fact: str
    verdict: Literal["same", "differs", "unrecorded", "unknown"]
    recorded: str | None
    found: str | None


def compare(base: BaseImage, image: RemoteImage) -> list[BaseComparison]:
    """Compare digest, size, CUDA version and driver requirement of `base` with those of its image."""
    return [
        BaseComparison(base.key, "tag", "same", base.reference, base.reference),
        _row(base, "digest", base.digest, image.digest, base.digest == image.digest),
        _size(base, image.compressed_bytes),
        _cuda(base, image.environment.get("CUDA_VERSION")),
        _requirement(base, image.environment.get("NVIDIA_REQUIRE_CUDA")),
    ]


def _row(base: BaseImage, fact: str, recorded: str | None, found: str | None, same: bool) -> BaseComparison:
    verdict: Literal["same", "differs", "unrecorded"] = "same" if same else "differs"
    return BaseComparison(base.key, fact, "unrecorded" if recorded is None and found else verdict, recorded, found)


def _size(base: BaseImage, found: int) -> BaseComparison:
    recorded = base.compressed_bytes
    same = recorded is not None and abs(found / recorded - 1) <= SIZE_TOLERANCE
    return _row(base, "compressed_bytes", None if recorded is None else size(recorded, 1), size(found, 1), same)


def _cuda(base: BaseImage, found: str | None) -> BaseComparison:
    version = ".".join(found.split(".")[:2]) if found else None
    same = base.cuda == version
    return BaseComparison(base.key, "cuda", "same" if same else "differs", base.cuda, found)


def _requirement(base: BaseImage, found: str | None) -> BaseComparison:
    """Compare driver requirements in any order. A requirement that cannot be parsed differs."""
    try:
        required = Requirement.parse(found) if found else None
    except ValueError:
        return BaseComparison(base.key, "require_cuda", "differs", base.require_cuda and "recorded", found)
    known = base.requirement
    same = (known and set(known.alternatives)) == (required and set(required.alternatives))
    recorded, actual = (requirement.describe() if requirement else None for requirement in (known, required))
    return BaseComparison(base.key, "require_cuda", "same" if same else "differs", recorded, actual)
