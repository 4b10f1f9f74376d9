"""Plain records about the Docker Engine, its images and its containers, and the options of a container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Defaults of a build and of its verification: seconds until the server in a container is ready, and pushes of a name.
READY_SECONDS = 900.0
ATTEMPTS = 4
_CDI_GPU = "nvidia.com/gpu"
# Name of the container toolkit for all NVIDIA GPUs of the machine.
CDI_ALL_GPUS = f"{_CDI_GPU}=all"


@dataclass(frozen=True)
class DockerInfo:
    """Facts about a Docker Engine. `platform` is such as `linux/amd64`. `cdi_gpu`: whether it has CDI NVIDIA GPUs."""

    version: str
    platform: str
    containerd_store: bool
    runtimes: tuple[str, ...]
    cdi_gpu: bool

    @property
    def gpu(self) -> bool:
        """Whether containers can use NVIDIA GPUs, by the NVIDIA runtime or by a device specification (CDI)."""
        return "nvidia" in self.runtimes or self.cdi_gpu


@dataclass(frozen=True)
class ImageInfo:
    """An image in the engine. `layers` are diff ids, bottom first; `size` is uncompressed bytes."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    platform: str
    user: str
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    labels: Mapping[str, str]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ContainerOptions:
    """The options of a container.

    `mounts`: path in the container -> host path, read-only. `volumes`: path in the container -> named volume.
    `network`: `host`, `none`, or None for the bridge network of the engine.
    `port`: port of the container that is published at `host`:`host_port` (0 selects a free port); not with `network`.
    """

    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    environment: Mapping[str, str] | None = None
    mounts: Mapping[str, str] | None = None
    volumes: Mapping[str, str] | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    host_port: int = 0
    network: str | None = None
    gpu: bool = False
    stdin: bool = False
    labels: Mapping[str, str] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ContainerState:
    """The state of a container. `exit_code` is None while it runs."""

    running: bool
    exit_code: int | None
    out_of_memory: bool
    error: str


def read_engine(info: Mapping[str, Any], version: Mapping[str, Any]) -> DockerInfo:
    """Parse the responses of the engine to `/info` and `/version`."""
    status = dict(pair for pair in info.get("DriverStatus") or [] if len(pair) == 2)
    devices = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or []]
    return DockerInfo(
        version=str(version["Version"]),
        platform=f"{version['Os']}/{version['Arch']}",
        containerd_store=str(status.get("driver-type", "")).startswith("io.containerd.snapshotter"),
        runtimes=tuple(sorted(info.get("Runtimes") or {})),
        cdi_gpu=any(device.partition("=")[0] == _CDI_GPU for device in devices),
    )


def read_image(found: Mapping[str, Any]) -> ImageInfo:
    """Parse the inspection of an image."""
    config = found.get("Config") or {}
    return ImageInfo(
        id=str(found["Id"]),
        tags=tuple(found.get("RepoTags") or ()),
        digests=tuple(found.get("RepoDigests") or ()),
        size=int(found.get("Size") or 0),
        platform=f"{found.get('Os')}/{found.get('Architecture')}",
        user=str(config.get("User") or ""),
        environment=dict(item.partition("=")[::2] for item in config.get("Env") or []),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        labels=dict(config.get("Labels") or {}),
        layers=tuple((found.get("RootFS") or {}).get("Layers") or ()),
    )
