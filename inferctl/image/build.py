"""Builds, verifies, tags and pushes an image, as a stream of events.

plan() --> run(): stage context --> buildx --> lint --> verify --> tag --> push --> compare with the verified image
          the image has no tag and is discarded on a failure    | tagged from here on
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image import buildx, library, lint, replaced
from inferctl.image.context import staged
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase, StepFinished
from inferctl.image.plan import BuildPlan, raise_for
from inferctl.image.publish import publish
from inferctl.image.records import DockerInfo, ImageInfo
from inferctl.image.verify import Verified, VerifyOptions, verify
from inferctl.image.verify import document as verification
from inferctl.models.fit import Finding
from inferctl.models.reference_process import LIBRARIES
from inferctl.models.weights_folders import downloads, weights_folders


@dataclass(frozen=True)
class Built:
    """The built image. `references` are its names. `digests` are the `name@sha256:...` of the pushed names.

    `size` is in uncompressed bytes, `compressed` in bytes as a registry stores them, None if unknown. `compressions`:
    those of the layers in the registry, empty if unknown.
    """

    image: str
    references: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    compressed: int | None
    compressions: tuple[str, ...]
    steps: tuple[StepFinished, ...]
    planned_findings: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    verified: tuple[Verified, ...]
    seconds: Mapping[str, float]

    @property
    def reference(self) -> str:
        """The first name of the image."""
        return self.references[0]

    @property
    def digest(self) -> str | None:
        """`name@sha256:...` of the first name; None if nothing was pushed."""
        return self.digests[0] if self.digests else None

    def document(self) -> dict[str, Any]:
        """Return the image as JSON data, for `--json`."""
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
            "compressions": list(self.compressions),
            "steps": steps,
            "findings": [vars(finding) for finding in (*self.planned_findings, *self.findings)],
            "verified": verification(self.verified),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def run(plan: BuildPlan, engine: DockerEngine, info: DockerInfo) -> Generator[Event, None, Built]:
    """Execute `plan`: yield events and return the image.

    On a failure, or if the generator is closed, containers and the untagged image are removed, and every name in
    `plan.references` refers to the same image as before.
    """
    options, platform = plan.options, plan.spec.image.platform
    builder = buildx.detect(info.containerd_store)
    cache_to = buildx.exportable(builder, options.cache_to)
    if cache_to != options.cache_to:
        yield Note(f"the build cache is not exported: {builder.describe()} cannot export one")
    times = {"start": time.monotonic()}
    with staged(plan.rendered, plan.server_files) as (context, contexts):
        request = buildx.BuildRequest(
            context=context,
            contexts=contexts,
            build_args=plan.rendered.build_args,
            secrets=options.secrets,
            # Every builder builds the platform of the engine by default, so it is not passed.
            platform=platform if platform != info.platform else None,
            cache_to=cache_to,
            cache_from=options.cache_from,
            network=options.network,
            no_cache=options.no_cache,
            pull=options.pull,
            compression=buildx.choose_compression(builder, info.version),
        )
        _check_supported(plan, builder, request, info)
        yield Phase("build", builder.describe())
        if builder.exports and " AS model-layers\n" in plan.rendered.dockerfile:
            yield from buildx.build_once(model_layers(request))
        steps, metadata = yield from buildx.build_once(request)
        times["build"] = time.monotonic()
        image = _loaded(engine, metadata)
        try:
            if options.expected not in (None, image.id):
                raise InferctlError(
                    f"the build produced {image.id}, but `--expect` requires {options.expected}",
                    "an input changed after that image was built: build and verify again without `--expect`",
                )
            findings, checked = yield from _lint_and_verify(plan, engine, info, image)
            changes = [replaced.findings(engine, image, each, push=options.push) for each in plan.references]
            findings += dict.fromkeys(itertools.chain.from_iterable(changes))
            yield from (Note(each.text()) for each in findings if each.topic == "space")
            times["verify"] = time.monotonic()
            config = str(metadata.get("containerimage.config.digest") or image.id)
            publication = yield from publish(plan, engine, builder, request, image, config)
            times["publish"] = time.monotonic()
        except BaseException:
            engine.discard(image.id)
            raise
    return Built(
        image=image.id,
        references=plan.references,
        digests=publication.digests,
        size=engine.size(plan.reference),
        compressed=publication.compressed,
        compressions=publication.compressions,
        steps=tuple(steps),
        planned_findings=plan.findings,
        findings=tuple(findings),
        verified=checked,
        seconds={name: end - begin for (_, begin), (name, end) in itertools.pairwise(times.items())},
    )


def model_layers(request: buildx.BuildRequest) -> buildx.BuildRequest:
    """Return a build of only the layers with the model, without compression, for a builder that exports.

    A builder compresses a layer when it first exports it, and keeps that form. So these layers stay equal to those of
    the model image, and the registry has them already. Not with `--no-cache`, which makes new layers.
    """
    output = "type=image,name=inferctl/model-layers,push=false,store=false,compression=uncompressed"
    return replace(request, target="model-layers", outputs=(output,), cache_to=())


def _check_supported(plan: BuildPlan, builder: buildx.Builder, request: buildx.BuildRequest, info: DockerInfo) -> None:
    """Raise `NotReadyError` if the builder or the engine cannot do the build."""
    buildx.check_supported(builder, request)
    if plan.options.verify and request.platform:
        raise NotReadyError(
            f"cannot verify an image for {request.platform}: this engine runs {info.platform}",
            "build it on a machine of that platform, or pass `--no-verify`",
        )
    if plan.options.verify and plan.stack.cuda and not info.gpu and "generate" in plan.tasks.values():
        raise NotReadyError(
            "cannot verify this image here: vLLM for GPUs does not run on a CPU, and the engine passes no GPU through",
            "build it on a machine with a GPU; or pass `--no-verify`, and run `inferctl verify` on such a machine",
        )


def _loaded(engine: DockerEngine, metadata: Mapping[str, Any]) -> ImageInfo:
    # The id of an image is the digest of its config in the classic store, of its manifest in the containerd store.
    for key in ("containerimage.digest", "containerimage.config.digest"):
        if (found := metadata.get(key)) and (image := engine.image(str(found))):
            return image
    raise NotReadyError(
        "the engine does not have the image that the builder loaded",
        "check that `docker buildx inspect` and `docker info` use the same engine",
    )


def _lint_and_verify(
    plan: BuildPlan, engine: DockerEngine, info: DockerInfo, image: ImageInfo
) -> Generator[Event, None, tuple[list[Finding], tuple[Verified, ...]]]:
    """Check the config of the untagged image, start it and compare its output with fp32.

    Returns the findings, and the verification of each model. Raises `InferctlError` if one of them fails.
    """
    findings = lint.check_built_image(image.environment, image.user)
    raise_for([finding for finding in findings if finding.level == "error"])
    if not plan.options.verify:
        return findings, ()
    gpu = plan.stack.cuda is not None and info.gpu
    yield Phase(
        "verify",
        "on the GPU" if gpu else "on the CPU: the engine has no GPU runtime" if plan.stack.cuda else "on the CPU",
    )
    if downloads(plan.spec):
        yield Note("the container downloads its weights: its output is checked, but not compared with fp32")
    return findings, tuple((yield from verify(engine, image, _verify_options(plan))))


def _verify_options(plan: BuildPlan) -> VerifyOptions:
    folders, compared = weights_folders(plan.spec), {}
    for each in folders:
        needed = LIBRARIES.get(plan.tasks.get(each.name, "generate"))
        # Without its weights on this machine, or for generation, the library has nothing to load.
        if each.name in plan.folders and each.weights != "download" and needed and library.installed(needed):
            compared[each.name if plan.spec.models else ""] = plan.folders[each.name]
    return VerifyOptions(
        mounts={each.path: plan.folders[each.name] for each in folders if each.weights == "mount"},
        network=plan.options.network,
        ready_seconds=plan.options.ready_seconds,
        library_models=compared,
    )
