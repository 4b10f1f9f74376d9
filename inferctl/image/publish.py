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
    """What a push left in registries: `digests` are `name@sha256:...`, one per name of the image.

    `compressed`: bytes that a registry stores. `pushed`: bytes that the push sent. None when not known.
    """

    digests: tuple[str, ...] = ()
    compressed: int | None = None
    pushed: int | None = None

    @property
    def digest(self) -> str | None:
        """That of the first name; None when nothing was pushed."""
        return self.digests[0] if self.digests else None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "pushed": self.digest,
            "digests": list(self.digests),
            "compressed_bytes": self.compressed,
            "pushed_bytes": self.pushed,
        }


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
    return (yield from _confirm(reference, pushed.digest, image, None, pushed.sent))


def publish(
    plan: BuildPlan,
    engine: Engine,
    builder: buildx.Builder,
    request: buildx.BuildRequest,
    platforms: tuple[str, ...],
    image: ImageInfo,
    config: str,
) -> Generator[Event, None, Outcome]:
    """Tag the image, export it and push it for `platforms` (none: the engine's).

    On failure every tag names what it named before.
    """
    options, references = plan.options, plan.references
    # From here on every build is the one that was verified, out of the cache; only its exports differ.
    again = replace(request, cache_to=(), platforms=platforms, no_cache=False, pull=False)
    if options.oci:
        yield Phase("export", str(options.oci))
        yield from _export(again, options.oci)
    before = {reference: engine.image(reference) for reference in references}
    try:
        for reference in references:
            yield Phase("tag", reference)
            engine.tag(image.id, reference)
        if not options.push:
            return Outcome()
        yield Phase("push", ", ".join(references))
        if builder.exports:
            digest = yield from _push_by_builder(plan, again)
            pushed: list[tuple[str, set[str] | None]] = [(digest, None)] * len(references)
        else:
            yield Note("no SBOM and no provenance: " + builder.describe() + " cannot attach them")
            pushed = []
            for reference in references:
                found = yield from engine.push(reference, options.attempts)
                pushed.append((found.digest, found.sent))
        outcomes = []
        for reference, (digest, sent) in zip(references, pushed, strict=True):
            outcomes.append((yield from _confirm(reference, digest, image, config, sent)))
    except BaseException:
        # An engine that died is why there is an error already.
        with contextlib.suppress(NotReadyError):
            for reference, former in before.items():
                if former:
                    engine.tag(former.id, reference)
                else:
                    engine.untag(reference)
        raise
    return _together(outcomes)


def _together(outcomes: list[Outcome]) -> Outcome:
    sent = [outcome.pushed for outcome in outcomes]
    return Outcome(
        tuple(digest for outcome in outcomes for digest in outcome.digests),
        outcomes[0].compressed,
        None if None in sent else sum(filter(None, sent)),
    )


def _push_by_builder(plan: BuildPlan, request: buildx.BuildRequest) -> Generator[Event, None, str]:
    options = plan.options
    # buildx reads an output as a line of CSV, in which several names are one quoted field.
    output = f'type=image,"name={",".join(plan.references)}",push=true'
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

    return (yield from retrying(attempt, ", ".join(plan.references), options.attempts))


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
        return Outcome((name,))
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
    return Outcome((name,), sum(sizes) + int(manifest["config"]["size"]), pushed)
