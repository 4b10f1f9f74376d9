"""Publishes an image as a tag, in a registry, and compares it with the verified image."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from dataclasses import dataclass, replace

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image import buildx, failures, registry
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase
from inferctl.image.image_name import split
from inferctl.image.plan import BuildPlan
from inferctl.image.push import PushFailedError, push, retrying
from inferctl.image.records import ATTEMPTS, ImageInfo


@dataclass(frozen=True)
class Publication:
    """The result of a push. `digests` are `name@sha256:...`, one per name of the image.

    `compressed`: bytes that the registry stores, None if unknown. `compressions`: those of the layers, such as `gzip`
    and `zstd`.
    """

    digests: tuple[str, ...] = ()
    compressed: int | None = None
    compressions: tuple[str, ...] = ()


def publish(
    plan: BuildPlan,
    engine: DockerEngine,
    builder: buildx.Builder,
    request: buildx.BuildRequest,
    image: ImageInfo,
    config: str,
) -> Generator[Event, None, Publication]:
    """Tag the image and push it. `config`: digest of its config.

    On a failure, every tag refers to the same image as before.
    """
    options, references = plan.options, plan.references
    before = {reference: engine.image(reference) for reference in references}
    try:
        for reference in references:
            yield Phase("tag", reference)
            engine.tag(image.id, reference)
        if not options.push:
            return Publication()
        yield Phase("push", ", ".join(references))
        if builder.exports:
            digests = [(yield from _push_by_builder(plan, request))] * len(references)
        else:
            yield Note("no SBOM and no provenance: " + builder.describe() + " cannot attach them")
            digests = []
            for reference in references:
                digests.append((yield from push(reference)))
        publications = []
        for reference, digest in zip(references, digests, strict=True):
            publications.append((yield from _confirm(f"{split(reference)[0]}@{digest}", image, config)))
    except BaseException:
        # Keep the first error: an engine that crashed causes both.
        with contextlib.suppress(NotReadyError):
            for reference, previous in before.items():
                if previous:
                    engine.tag(previous.id, reference)
                else:
                    engine.untag(reference)
        raise
    return replace(publications[0], digests=tuple(found for each in publications for found in each.digests))


def _push_by_builder(plan: BuildPlan, request: buildx.BuildRequest) -> Generator[Event, None, str]:
    options = plan.options
    # buildx parses an output as CSV, so several names are one quoted field.
    output = f'type=image,"name={",".join(plan.references)}",push=true'
    # This build takes the verified layers from the cache and only exports them differently.
    push_request = replace(request, outputs=(output,), cache_to=(), no_cache=False, pull=False)
    push_request = replace(push_request, provenance=options.provenance, sbom=options.sbom)

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
                elif push_request.compression == "zstd" and failures.rejects_zstd(message):
                    note = f"the layers are pushed with gzip: the registry does not accept zstd ({message})"
                    push_request = replace(push_request, compression="gzip", force_compression=True)
                else:
                    raise PushFailedError(message) from None
            yield Note(note)

    return (yield from retrying(attempt, ", ".join(plan.references), ATTEMPTS))


def _confirm(name: str, image: ImageInfo, config: str) -> Generator[Event, None, Publication]:
    """Check that the registry has the verified image as `name`, a name@digest.

    `config`: digest of the verified image's config.
    """
    try:
        manifest = registry.manifest(name, image.platform)
    except NotReadyError as error:
        if not failures.unreachable(error.message):
            raise
        yield Note(f"the image is pushed, but not compared with the verified image: {error.message}")
        return Publication((name,))
    found = str(manifest["config"]["digest"])
    if found != config:
        raise InferctlError(
            f"{name} is not the verified image: its config is {found}, expected {config}",
            "build and push again; another process may have pushed the same name at the same time",
        )
    types = (re.search(r"(?:gzip|zstd)$", str(layer.get("mediaType"))) for layer in manifest["layers"])
    compressions = sorted({each.group() if each else "none" for each in types})
    return Publication(
        (name,), sum(int(part["size"]) for part in (*manifest["layers"], manifest["config"])), tuple(compressions)
    )
