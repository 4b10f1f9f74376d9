"""The ways out: a name in the engine, a registry, an OCI archive. What a registry then has is compared with what was verified."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferctl.errors import InferctlError, NotReadyError
from inferctl.image import buildx, failures
from inferctl.image.docker import Engine
from inferctl.image.events import BuildEvent, Event, Note, Phase, StepFinished
from inferctl.image.plan import BuildPlan
from inferctl.image.push import PushFailedError, retrying
from inferctl.image.records import ImageInfo
from inferctl.image.reference import split


@dataclass(frozen=True)
class Outcome:
    """`digest` is `name@sha256:...`. `compressed`: bytes the registry stores; `pushed`: bytes this push sent; None when not known."""

    digest: str | None = None
    compressed: int | None = None
    pushed: int | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"pushed": self.digest, "compressed_bytes": self.compressed, "pushed_bytes": self.pushed}


def build_once(request: buildx.BuildRequest) -> Generator[BuildEvent, None, tuple[list[StepFinished], dict[str, Any]]]:
    """One build; passes its events on and keeps the finished steps."""
    steps: list[StepFinished] = []
    with contextlib.closing(buildx.run(request)) as running:
        try:
            while True:
                event = next(running)
                if isinstance(event, StepFinished):
                    steps.append(event)
                yield event
        except StopIteration as end:
            return steps, end.value
        except buildx.BuildFailedError as error:
            raise failures.of_build(error.text, error.step, error.log) from None


def push_named(engine: Engine, reference: str, attempts: int) -> Generator[Event, None, Outcome]:
    """Push the image that `reference` names in the engine; `NotReadyError` when there is none."""
    image = engine.image(reference)
    if image is None:
        raise NotReadyError(
            f"there is no image {reference} in the engine",
            "`docker images` lists what is there; `inferctl build` makes one",
        )
    yield Phase("push", reference)
    pushed = yield from engine.push(reference, attempts)
    sent = {layer for layer, status in pushed.layers.items() if status == "pushed"}
    return (yield from _confirm(reference, pushed.digest, image, None, sent))


def publish(
    plan: BuildPlan,
    engine: Engine,
    builder: buildx.Builder,
    request: buildx.BuildRequest,
    platforms: tuple[str, ...],
    image: ImageInfo,
    config: str,
) -> Generator[Event, None, Outcome]:
    """Name the image, export and push it for `platforms` (none: the engine's). On failure the name goes back to what it named before."""
    options, reference = plan.options, plan.reference
    # From here on every build is the one that was verified, out of the cache; only its exports differ.
    again = replace(request, cache_to=(), platforms=platforms, no_cache=False, pull=False)
    if options.oci:
        yield Phase("export", str(options.oci))
        yield from _export(again, options.oci)
    before = engine.image(reference)
    outcome = Outcome()
    try:
        yield Phase("tag", reference)
        engine.tag(image.id, reference)
        if options.push:
            yield Phase("push", reference)
            if builder.exports:
                digest, sent = (yield from _push_by_builder(plan, again)), None
            else:
                yield Note("no SBOM and no provenance: " + builder.describe() + " cannot attach them")
                pushed = yield from engine.push(reference, options.attempts)
                digest = pushed.digest
                sent = {layer for layer, status in pushed.layers.items() if status == "pushed"}
            outcome = yield from _confirm(reference, digest, image, config, sent)
    except BaseException:
        # An engine that died is why there is an error already.
        with contextlib.suppress(NotReadyError):
            if before:
                engine.tag(before.id, reference)
            else:
                engine.untag(reference)
        raise
    return outcome


def _push_by_builder(plan: BuildPlan, request: buildx.BuildRequest) -> Generator[Event, None, str]:
    options = plan.options
    output = f"type=image,name={plan.reference},push=true"
    wanted = replace(request, outputs=(output,), provenance=options.provenance, sbom=options.sbom)

    def attempt() -> Generator[Event, None, str]:
        nonlocal wanted
        while True:
            try:
                metadata = yield from buildx.run(wanted)
                return str(metadata["containerimage.digest"])
            except buildx.BuildFailedError as error:
                if not (wanted.sbom and "buildkit-syft-scanner" in error.text):
                    raise PushFailedError(failures.last_line(error.text)) from None
            yield Note("no SBOM: the builder cannot pull its scanner (docker/buildkit-syft-scanner)")
            wanted = replace(wanted, sbom=False)

    return (yield from retrying(attempt, plan.reference, options.attempts))


def _export(request: buildx.BuildRequest, target: Path) -> Generator[Event, None, None]:
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield from build_once(replace(request, outputs=(f"type=oci,dest={partial}",)))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _confirm(
    reference: str, digest: str, image: ImageInfo, config: str | None, sent: set[str] | None
) -> Generator[Event, None, Outcome]:
    """Ask the registry what it has under `digest`: it must be the image that was verified.

    `config`: digest of the verified image's configuration, None when nothing was. `sent`: short diff ids, None when not known.
    """
    name = f"{split(reference)[0]}@{digest}"
    try:
        manifest = buildx.manifest(name, image.platform)
    except NotReadyError as error:
        if not failures.unreachable(error.message):
            raise
        yield Note(f"pushed, but not compared with what was verified: {error.message}")
        return Outcome(name)
    try:
        sizes = [int(layer["size"]) for layer in manifest["layers"]]
        found = str(manifest["config"]["digest"])
    except (KeyError, TypeError, ValueError):
        raise InferctlError(
            f"{name} is not an image: its manifest in the registry has no layers or no configuration",
            f"`docker buildx imagetools inspect {name}` shows what is there; build and push again",
        ) from None
    if config is not None and found != config:
        raise InferctlError(
            f"{name} is not the image that was verified: its configuration is {found}, the verified one's {config}",
            "was the same name pushed by someone else at the same time? Build and push again",
        )
    pushed = None
    if sent is not None and len(sizes) == len(image.layers):
        pushed = sum(
            size for size, layer in zip(sizes, image.layers, strict=True) if layer.partition(":")[2][:12] in sent
        )
        pushed += int(manifest["config"]["size"])
    return Outcome(name, sum(sizes) + int(manifest["config"]["size"]), pushed)
