"""Queries registries through `docker buildx imagetools`, which has the logins of the docker command. Nothing is pulled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.image import failures
from inferctl.image.buildx import docker
from inferctl.image.image_name import host_of

# buildx waits forever for the manifest of an image.
_REGISTRY_S = 60.0


def manifest(reference: str, platform: str) -> dict[str, Any]:
    """Return the image manifest of `reference` in its registry, from an index for `platform`.

    The sizes of its layers are in compressed bytes.
    """
    found = _raw_manifest(reference)
    if (entry := _entry(found, platform)) is not None:
        found = _raw_manifest(f"{reference.partition('@')[0]}@{entry}")
    elif "manifests" in found:
        raise InferctlError(f"{reference} has no image for {platform}", f"build it with `--platform {platform}`")
    layers, config = found.get("layers"), found.get("config")
    if not isinstance(layers, list) or not isinstance(config, dict) or not all(map(_is_layer, [*layers, config])):
        raise InferctlError(
            f"the manifest of {reference} is not one of an image: it has no valid list of layers",
            "check the name: a Helm chart or a signature is no image",
        )
    return found


def _is_layer(found: Any) -> bool:
    return isinstance(found, dict) and type(found.get("size")) is int and isinstance(found.get("digest"), str)


def _entry(index: Mapping[str, Any], platform: str) -> str | None:
    """Return the digest of the image for `platform` in an index, None without one."""
    entries = index.get("manifests")
    for entry in entries if isinstance(entries, list) else []:
        offered = entry.get("platform") if isinstance(entry, dict) else None
        if isinstance(offered, dict) and [offered.get("os"), offered.get("architecture")] == platform.split("/")[:2]:
            return str(entry.get("digest"))
    return None


def _raw_manifest(reference: str) -> dict[str, Any]:
    try:
        found = json.loads(docker("buildx", "imagetools", "inspect", "--raw", reference, timeout_s=_REGISTRY_S))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InferctlError(
            f"the registry returned no JSON object as the manifest of {reference}", "check the log of the registry"
        )
    return found


@dataclass(frozen=True)
class RemoteImage:
    """An image of one platform in a registry: the digests and bytes of its layers there, and its labels."""

    layers: tuple[tuple[str, int], ...]
    labels: Mapping[str, str]


def digest(reference: str) -> str:
    """Return the current digest (`sha256:...`) of `reference` in its registry.

    Raises `UsageError` if the registry does not have the image, `NotReadyError` if the registry cannot be reached.
    """
    return str(_imagetools(reference, "{{json .Manifest}}")["digest"])


def remote_image(reference: str, platform: str) -> RemoteImage:
    """Return facts of `reference` on `platform` from its registry, without a pull. Raises the errors of `digest`."""
    found = _imagetools(reference, "{{json .Manifest}}")
    if "manifests" in found:
        if (entry := _entry(found, platform)) is None:
            raise UsageError(f"{reference} has no image for {platform}", "pass another platform or image")
        reference = f"{reference.partition('@')[0]}@{entry}"
    layers = manifest(reference, platform)["layers"]
    config = _imagetools(reference, "{{json .Image}}").get("config") or {}
    return RemoteImage(
        tuple((str(layer["digest"]), int(layer["size"])) for layer in layers), dict(config.get("Labels") or {})
    )


def _imagetools(reference: str, template: str) -> dict[str, Any]:
    """Return the JSON output of `docker buildx imagetools inspect` for `reference`, formatted with `template`."""
    try:
        inspection = docker("buildx", "imagetools", "inspect", "--format", template, reference, timeout_s=_REGISTRY_S)
        found = json.loads(inspection)
    except ValueError:
        found = None
    except NotReadyError as error:
        message = error.message.rpartition("ERROR: ")[2]
        if message == error.message:  # docker or buildx is missing
            raise
        if message.endswith(": not found"):
            hint = "check the name and the tag; the registry may have deleted an old tag"
            raise UsageError(f"image {reference} not found in its registry", hint) from None
        if page := failures.web_page(message, reference):
            raise page from None
        login = f"check the network, or run `docker login {host_of(reference)}`"
        hint = failures.without_registry(reference) or login
        raise NotReadyError(f"cannot query the registry of {reference}: {message}", hint) from None
    if not isinstance(found, dict):
        raise InferctlError(f"the registry returned no JSON object for {reference}", "check the log of the registry")
    return found
