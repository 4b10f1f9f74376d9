"""Plan, build, verify, tag, push: the whole way of an image, as a stream of events.

plan() ──► run():  stage context ──► buildx ──► lint ──► verify ──► tag ──► push ──► compare with what was verified
                              an image without a name │ discarded when anything fails │ named only from here on
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferctl.errors import InferctlError, NotReadyError
from inferctl.fit import Finding
from inferctl.image import buildx, forecast, layers, lint
from inferctl.image.context import staged
from inferctl.image.docker import Engine
from inferctl.image.events import Event, Note, Phase, StepFinished
from inferctl.image.plan import BuildPlan, refuse
from inferctl.image.publish import Outcome, build_once, publish
from inferctl.image.records import EngineInfo, ImageInfo, LayerInfo
from inferctl.image.verify import Verified, VerifyOptions, verify
from inferctl.sizes import size

# Reading an image out of the engine to look for hidden files takes about a second for each 100 MB.
_ANALYSED_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Built:
    """The built image. `references` are its names, `digests` the `name@sha256:...` of each that was pushed.

    Sizes are bytes: `size` uncompressed, `compressed` as a registry stores it, `pushed` what this push sent. The last
    two are None when not known.
    """

    image: str
    references: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    compressed: int | None
    pushed: int | None
    steps: tuple[StepFinished, ...]
    layers: tuple[LayerInfo, ...]
    planned_findings: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    verified: Verified | None
    forecast: forecast.Forecast
    seconds: Mapping[str, float]

    @property
    def reference(self) -> str:
        """The first name of the image."""
        return self.references[0]

    @property
    def digest(self) -> str | None:
        """`name@sha256:...` of the first name; None when nothing was pushed."""
        return self.digests[0] if self.digests else None

    def document(self) -> dict[str, Any]:
        """As JSON, for `--json`."""
        steps = [
            {"name": s.name, "seconds": round(s.seconds, 3), "cached": s.cached, "bytes": s.bytes} for s in self.steps
        ]
        return {
            "image": self.image,
            "reference": self.reference,
            "references": list(self.references),
            "pushed": self.digest,
            "digests": list(self.digests),
            "size_bytes": self.size,
            "compressed_bytes": self.compressed,
            "pushed_bytes": self.pushed,
            "forecast": self.forecast.document(),
            "steps": steps,
            "layers": [vars(layer) for layer in self.layers],
            "findings": [vars(finding) for finding in (*self.planned_findings, *self.findings)],
            "verified": self.verified.document() if self.verified else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def run(plan: BuildPlan, engine: Engine, info: EngineInfo) -> Generator[Event, None, Built]:
    """Do what `plan` says; yields events and returns the image.

    Whatever fails, or when this generator is closed: containers are removed, the image without a name is discarded, and
    every name of `plan.references` names what it named before.
    """
    options, platforms = plan.options, plan.platforms
    builder = buildx.detect(info.containerd_store, options.builder)
    native = info.platform if info.platform in platforms else platforms[0]
    # The engine's own platform is not asked for by name: it is what every builder makes by itself.
    named = platforms if platforms != (info.platform,) else ()
    cache_to = buildx.exportable(builder, options.cache_to)
    if cache_to != options.cache_to:
        yield Note(f"no build cache is exported: {builder.describe()} cannot export one")
    clock = _Clock()
    with staged(plan.rendered, plan.server) as (context, contexts):
        request = buildx.BuildRequest(
            context=context,
            contexts=contexts,
            build_args=plan.rendered.build_args,
            secrets=options.secrets,
            platforms=(native,) if named else (),
            cache_to=cache_to,
            cache_from=options.cache_from,
            network=options.network,
            builder=options.builder,
            no_cache=options.no_cache,
            pull=options.pull,
        )
        _refuse(plan, builder, replace(request, platforms=named), info)
        yield Phase("build", builder.describe())
        if builder.checks:
            for warning in buildx.check(request):
                yield Note(f"Dockerfile check: {warning}")
        steps, metadata = yield from build_once(request)
        clock.lap("build")
        image = _loaded(engine, metadata)
        try:
            _expect(options.expected, image)
            yield from weigh(plan, info, image)
            yield from unverified(plan, native)
            findings, checked = yield from _examine(plan, engine, info, image, steps)
            clock.lap("verify")
            outcome = yield from publish(plan, engine, builder, request, named, image, _config_digest(metadata, image))
            clock.lap("publish")
        except BaseException:
            engine.discard(image.id)
            raise
    if options.metadata_file:
        _write_metadata(options.metadata_file, metadata, plan.references, image, outcome)
    made = engine.history(plan.reference)
    return Built(
        image=image.id,
        references=plan.references,
        digests=outcome.digests,
        # The containerd store reports the packed size of an image; the layers are unpacked in both.
        size=sum(layer.size for layer in made),
        compressed=outcome.compressed,
        pushed=outcome.pushed,
        steps=tuple(steps),
        layers=named_layers(made, steps),
        planned_findings=plan.findings,
        findings=tuple(findings),
        verified=checked,
        forecast=plan.forecast,
        seconds=clock.laps,
    )


def _refuse(plan: BuildPlan, builder: buildx.Builder, request: buildx.BuildRequest, info: EngineInfo) -> None:
    """Raise for what the builder or the engine cannot do; `request` is the build for all platforms."""
    outputs = (f"type=oci,dest={plan.options.oci}",) if plan.options.oci else ()
    buildx.refuse(builder, replace(request, outputs=outputs))
    if plan.options.verify and info.platform not in plan.platforms:
        raise NotReadyError(
            f"an image for {plan.platforms[0]} cannot be started on this engine ({info.platform}), so it cannot be verified",
            "build it on such a machine, or give `--no-verify`",
        )


def _expect(expected: str | None, image: ImageInfo) -> None:
    if expected is not None and image.id != expected:
        raise InferctlError(
            f"the build produced {image.id}, not the image {expected} that `--expect` names",
            "an input changed since that image was built: build and verify again without `--expect`",
        )


def unverified(plan: BuildPlan, native: str) -> Iterator[Note]:
    """Says which images of a build for several platforms are built but neither linted nor verified: all but the `native` one."""
    others = ", ".join(platform for platform in plan.platforms if platform != native)
    if others:
        what = "linted and verified" if plan.options.verify else "linted"
        yield Note(f"only the image for {native} is {what}; {others}: built from the same files, not started")


def weigh(plan: BuildPlan, info: EngineInfo, image: ImageInfo) -> Iterator[Note]:
    """Hold the image against --max-size: packed where the engine stores it so, else unpacked, which is always more."""
    limit = plan.options.max_bytes
    if limit is None or image.size <= limit:
        return
    advice = "raise --max-size, or drop what is biggest: `inferctl build --dry-run` lists the parts"
    if info.containerd_store:
        raise InferctlError(
            f"the image has {size(image.size)}, more than the {size(limit)} of --max-size (compressed)", advice
        )
    if not plan.forecast.complete:
        raise InferctlError(
            f"the image has {size(image.size)} uncompressed, more than the {size(limit)} of --max-size; this engine does not "
            f"know its compressed size, and without the size of {', '.join(plan.forecast.unknown)} it cannot be forecast",
            "raise --max-size to what it may be uncompressed, or use the engine's containerd image store",
        )
    yield Note(
        f"{size(image.size)} uncompressed; this engine does not know the compressed size: the forecast of "
        f"{size(plan.forecast.total)} stands for --max-size"
    )


def matched(history: list[LayerInfo], steps: list[StepFinished]) -> list[tuple[LayerInfo, StepFinished | None]]:
    """The image's layers, each with the step of the last stage that made it; None for what the base brings and for metadata."""
    numbered = [(m, s) for s in steps if (m := re.match(r"\[(?:(\S+) )?(\d+)/\d+\] (?!FROM |LINK )", s.name))]
    if not numbered:
        return [(layer, None) for layer in history]
    # The last stage has no name of its own; BuildKit numbers it.
    stage = max((m.group(1) or "" for m, _ in numbered), key=lambda name: name.startswith("stage-"))
    made = [step for m, step in sorted(numbered, key=lambda pair: int(pair[0].group(2))) if (m.group(1) or "") == stage]
    filled = [index for index, layer in enumerate(history) if layer.created_by.startswith(("COPY ", "RUN ", "ADD "))]
    found = dict(zip(filled[-len(made) :], made, strict=True)) if len(filled) >= len(made) else {}
    return [(layer, found.get(index)) for index, layer in enumerate(history)]


def named_layers(history: list[LayerInfo], steps: list[StepFinished]) -> tuple[LayerInfo, ...]:
    """The layers in the words of the Dockerfile where `matched` knows them, else in the engine's."""
    return tuple(
        replace(layer, created_by=step.name.partition("] ")[2]) if step else layer
        for layer, step in matched(history, steps)
    )


def new_bytes(history: list[LayerInfo], steps: list[StepFinished]) -> int:
    """Uncompressed bytes of the layers that this build made rather than found in the cache."""
    return sum(layer.size for layer, step in matched(history, steps) if step is not None and not step.cached)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now


def _loaded(engine: Engine, metadata: Mapping[str, Any]) -> ImageInfo:
    # The classic store names an image by its configuration, the containerd store by its manifest.
    for key in ("containerimage.digest", "containerimage.config.digest"):
        if (found := metadata.get(key)) and (image := engine.image(str(found))):
            return image
    raise NotReadyError(
        "the builder's image did not arrive in the engine",
        "check that `docker buildx inspect` and `docker info` speak of one engine",
    )


def _config_digest(metadata: Mapping[str, Any], image: ImageInfo) -> str:
    return str(metadata.get("containerimage.config.digest") or image.id)


def _examine(
    plan: BuildPlan, engine: Engine, info: EngineInfo, image: ImageInfo, steps: list[StepFinished]
) -> Generator[Event, None, tuple[list[Finding], Verified | None]]:
    options = plan.options
    waste = None
    # A build that changes next to nothing hides next to nothing, and an earlier one has told what the cached layers hide.
    analysed = options.lint_layers and new_bytes(engine.history(image.id), steps) >= lint.WASTE_BYTES
    if analysed and image.size <= _ANALYSED_BYTES:
        waste = layers.analyse(engine.save(image.id))
    elif analysed:
        yield Note(f"layers not analysed for wasted bytes: the image has {size(image.size)}")
    findings = lint.built(image.environment, image.user, waste)
    refuse([finding for finding in findings if finding.level == "error"])
    if not options.verify:
        return findings, None
    fetched = plan.spec.model.weights == "download"
    gpu = plan.stack.cuda is not None and info.gpu
    yield Phase(
        "verify",
        "on the GPU" if gpu else "on the CPU: the engine has no GPU runtime" if plan.stack.cuda else "on the CPU",
    )
    if fetched:
        yield Note("the weights are downloaded when the container starts: vectors are checked, but not against fp32")
    wanted = VerifyOptions(
        model=plan.model if plan.spec.model.weights == "mount" else None,
        network=options.network,
        gpu=gpu,
        ready_seconds=options.ready_seconds,
        compare=not fetched,
    )
    return findings, (yield from verify(engine, image, wanted))


def _write_metadata(
    file: Path, metadata: Mapping[str, Any], references: tuple[str, ...], image: ImageInfo, outcome: Outcome
) -> None:
    document = {**metadata, "image.name": ",".join(references), "image.id": image.id}
    if outcome.digest:
        document["containerimage.digest"] = outcome.digest.partition("@")[2]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise NotReadyError(
            f"{outcome.digest or references[0]} is done, but {file} cannot be written: {error.strerror}",
            "the next build is cached: give another --metadata-file",
        ) from None
