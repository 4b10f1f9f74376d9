"""Publishes an image as a tag, in a registry or as an OCI archive, and compares it with the verified image."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.core.partials import partial_folder
from inferctl.image import buildx, failures
from inferctl.image.compression import Compression
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase
from inferctl.image.image_name import split
from inferctl.image.plan import BuildPlan
from inferctl.image.push import PushFailedError, retrying
from inferctl.image.records import ImageInfo


@dataclass(frozen=True)
class Publication:
    """The result of a push. `digests` are `name@sha256:...`, one per name of the image.

    `compressed`: bytes that the registry stores. `pushed`: bytes that the push sent. None if unknown. `compressions`:
    those of the layers, such as `gzip` and `zstd`.
    """

    digests: tuple[str, ...] = ()
    compressed: int | None = None
    pushed: int | None = None
    compressions: tuple[str, ...] = ()

    @property
    def digest(self) -> str | None:
        """Digest of the first name; None if nothing was pushed."""
        return self.digests[0] if self.digests else None

    def document(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {
            "pushed": self.digest,
            "digests": list(self.digests),
            "compressed_bytes": self.compressed,
            "pushed_bytes": self.pushed,
            "compressions": list(self.compressions),
        }


def push_named(engine: DockerEngine, reference: str) -> Generator[Event, None, Publication]:
    """Push the image `reference` of the engine. Raises `NotReadyError` if the engine does not have it."""
    image = engine.image(reference)
    if image is None:
        raise NotReadyError(
            f"image {reference} not found in the engine",
            "build it with `inferctl build`; `docker images` lists the images",
        )
    yield Phase("push", reference)
    pushed = yield from engine.push(reference)
    return (yield from _confirm(reference, pushed.digest, image, None, pushed.sent))


def publish(
    plan: BuildPlan,
    engine: DockerEngine,
    builder: buildx.Builder,
    request: buildx.BuildRequest,
    platforms: tuple[str, ...],
    image: ImageInfo,
    config: str,
) -> Generator[Event, None, Publication]:
    """Tag the image, export it and push it for `platforms` (empty: the platform of the engine).

    On a failure, every tag refers to the same image as before.
    """
    options, references = plan.options, plan.references
    # Further builds take the verified layers from the cache and only export them differently.
    export_request = replace(request, cache_to=(), platforms=platforms, no_cache=False, pull=False)
    if options.oci:
        yield Phase("export", str(options.oci))
        yield from _export(export_request, options.oci)
    before = {reference: engine.image(reference) for reference in references}
    try:
        for reference in references:
            yield Phase("tag", reference)
            engine.tag(image.id, reference)
        if not options.push:
            return Publication()
        yield Phase("push", ", ".join(references))
        if builder.exports:
            digest = yield from _push_by_builder(plan, export_request)
            pushed: list[tuple[str, set[str] | None]] = [(digest, None)] * len(references)
        else:
            yield Note("no SBOM and no provenance: " + builder.describe() + " cannot attach them")
            pushed = []
            for reference in references:
                found = yield from engine.push(reference, options.attempts)
                pushed.append((found.digest, found.sent))
        publications = []
        for reference, (digest, sent) in zip(references, pushed, strict=True):
            publications.append((yield from _confirm(reference, digest, image, config, sent)))
    except BaseException:
        # Keep the first error: an engine that crashed causes both.
        with contextlib.suppress(NotReadyError):
            for reference, previous in before.items():
                if previous:
                    engine.tag(previous.id, reference)
                else:
                    engine.untag(reference)
        raise
    return _combine(publications)


def _combine(publications: list[Publication]) -> Publication:
    sent = [publication.pushed for publication in publications]
    return Publication(
        tuple(digest for publication in publications for digest in publication.digests),
        publications[0].compressed,
        None if None in sent else sum(filter(None, sent)),
        publications[0].compressions,
    )


def _push_by_builder(plan: BuildPlan, request: buildx.BuildRequest) -> Generator[Event, None, str]:
    options = plan.options
    # buildx parses an output as CSV, so several names are one quoted field.
    output = f'type=image,"name={",".join(plan.references)}",push=true'
    push_request = replace(request, outputs=(output,), provenance=options.provenance, sbom=options.sbom)

    def attempt() -> Generator[Event, None, str]:
        nonlocal push_request
        while True:
            try:
                metadata = yield from buildx.run(push_request)
                return str(metadata["containerimage.digest"])
            except buildx.BuildFailedError as error:
                message = failures.last_line(error.text)
                if push_request.sbom and "buildkit-syft-scanner" in error.text:
                    note = "no SBOM: the builder cannot pull its scanner (docker/buildkit-syft-scanner)"
                    push_request = replace(push_request, sbom=False)
                elif push_request.compression == Compression("zstd") and failures.rejects_zstd(message):
                    note = f"the layers are pushed with gzip: the registry does not accept zstd ({message})"
                    push_request = replace(push_request, compression=Compression("gzip", every_layer=True))
                else:
                    raise PushFailedError(message) from None
            yield Note(note)

    return (yield from retrying(attempt, ", ".join(plan.references), options.attempts))


def _export(request: buildx.BuildRequest, target: Path) -> Generator[Event, None, None]:
    with partial_folder(target, 0o700) as folder:
        archive = folder / "archive.tar"
        yield from buildx.build_once(replace(request, outputs=(f"type=oci,dest={archive}",)))
        archive.replace(target)


def _confirm(
    reference: str, digest: str, image: ImageInfo, config: str | None, sent: set[str] | None
) -> Generator[Event, None, Publication]:
    """Check that the registry has the verified image under `digest`.

    `config`: digest of the verified image's config, None without verification. `sent`: short diff ids of the layers
    that were sent, None if unknown.
    """
    name = f"{split(reference)[0]}@{digest}"
    try:
        manifest = buildx.manifest(name, image.platform)
    except NotReadyError as error:
        if not failures.unreachable(error.message):
            raise
        yield Note(f"the image is pushed, but not compared with the verified image: {error.message}")
        return Publication((name,))
    sizes = [int(layer["size"]) for layer in manifest["layers"]]
    found_types = [re.search(r"(?:gzip|zstd)$", str(layer.get("mediaType"))) for layer in manifest["layers"]]
    found = str(manifest["config"]["digest"])
    if config is not None and found != config:
        raise InferctlError(
            f"{name} is not the verified image: its config is {found}, expected {config}",
            "build and push again; another process may have pushed the same name at the same time",
        )
    pushed = None
    if sent is not None and len(sizes) == len(image.layers):
        pushed = sum(
            size for size, layer in zip(sizes, image.layers, strict=True) if layer.partition(":")[2][:12] in sent
        )
        pushed += int(manifest["config"]["size"])
    compressions = sorted({found_type.group() if found_type else "none" for found_type in found_types})
    return Publication((name,), sum(sizes) + int(manifest["config"]["size"]), pushed, tuple(compressions))
