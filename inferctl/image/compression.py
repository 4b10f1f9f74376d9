"""Chooses how the layers of an image are compressed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from inferctl.core.errors import NotReadyError
from inferctl.image.buildx import CREATE_BUILDER, Builder

# BuildKit has four levels: 0-2, 3-6, 7-8 and 9-22 (https://github.com/docker/docs/issues/23757). The third takes about
# half of the CPU time of gzip; the fourth takes more than gzip. docs/build.md has the measurement.
ZSTD_LEVEL = 7
# The first Docker Engine that reads zstd layers (https://docs.docker.com/engine/release-notes/23.0/).
_ENGINE_SINCE = 23


@dataclass(frozen=True)
class Compression:
    """How a build compresses layers.

    `every_layer`: also those that the base or the build cache has in another compression. Otherwise they stay as they
    are, so that a registry and a node share the layers of a base with other images.
    """

    method: Literal["gzip", "zstd"]
    every_layer: bool = False

    @property
    def cache_fields(self) -> str:
        """Fields for `--cache-to`."""
        return f"compression={self.method}" + (f",compression-level={ZSTD_LEVEL}" if self.method == "zstd" else "")

    @property
    def fields(self) -> str:
        """Fields for `--output`.

        Always OCI media types: with those of Docker, CRI-O and older containerd cannot pull zstd layers, also not those
        of a base (https://github.com/triggerdotdev/trigger.dev/pull/4184).
        """
        force = ",force-compression=true" if self.every_layer else ""
        return f"{self.cache_fields},oci-mediatypes=true{force}"


def choose(setting: Literal["auto", "zstd", "gzip"], builder: Builder, engine_version: str) -> Compression | None:
    """Return the compression for `image.compression`, None if the engine always compresses with gzip when it pushes.

    Raises `NotReadyError` if the builder cannot do it.
    """
    if not builder.exports:
        if setting == "zstd":
            raise NotReadyError(f"{builder.describe()} cannot push zstd layers", CREATE_BUILDER)
        return None
    if setting == "auto":
        major = re.match(r"\d+", engine_version)
        return Compression("zstd" if major and int(major.group()) >= _ENGINE_SINCE else "gzip")
    return Compression(setting, every_layer=True)
