"""How the layers of an image are compressed. `buildx.choose_compression` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# BuildKit has four levels: 0-2, 3-6, 7-8 and 9-22 (https://github.com/docker/docs/issues/23757). The third takes two
# thirds of the CPU time of gzip, the fourth twice as much as gzip. docs/build.md has the measurement.
ZSTD_LEVEL = 7


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
