"""What a build will do, decided before the engine is asked: all of a dry run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferctl import fit, locks, outputs
from inferctl.errors import InferctlError, UsageError
from inferctl.image import forecast, lint
from inferctl.image.push import ATTEMPTS
from inferctl.image.reference import host_of
from inferctl.image.verify import READY_SECONDS
from inferctl.sizes import size

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack
    from inferctl.render import Rendered
    from inferctl.spec import Spec


@dataclass(frozen=True)
class BuildOptions:
    """What the command line says. `secrets`: id -> file. `today` decides what is past its end of life.

    `spec_file` is where the spec comes from.
    `references`: names of the image; none means the one of the spec. `expected`: id of the only image that may be
    published, None for any.
    """

    push: bool = False
    verify: bool = True
    lint_layers: bool = True
    platforms: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    oci: Path | None = None
    metadata_file: Path | None = None
    references: tuple[str, ...] = ()
    secrets: Mapping[str, Path] = field(default_factory=dict)
    network: str | None = None
    allow_floating: bool = False
    max_bytes: int | None = None
    expected: str | None = None
    builder: str | None = None
    no_cache: bool = False
    pull: bool = False
    provenance: bool = True
    sbom: bool = True
    ready_seconds: float = READY_SECONDS
    attempts: int = ATTEMPTS
    spec_file: Path | None = None
    today: datetime.date = field(default_factory=datetime.date.today)


@dataclass(frozen=True)
class BuildPlan:
    """Everything decided before the engine is asked.

    `references`: names of the image, with tags; one at least. `model`: the folder of the weights that a
    verification mounts. `plan` sets none: a dry run needs no weights.
    """

    references: tuple[str, ...]
    spec: Spec
    base: BaseImage
    stack: Stack
    rendered: Rendered
    server: Mapping[str, Path]
    model: Path | None
    forecast: forecast.Forecast
    findings: tuple[fit.Finding, ...]
    options: BuildOptions

    @property
    def reference(self) -> str:
        """The first name of the image."""
        return self.references[0]

    @property
    def needs_model(self) -> bool:
        """Whether `run` needs the weights here: to bake a local folder, or to mount them in a verification."""
        weights = self.spec.model.weights
        return (weights == "mount" and self.options.verify) or (weights == "bake" and "model" in self.rendered.contexts)

    @property
    def platforms(self) -> tuple[str, ...]:
        """What to build for, as in `linux/amd64`."""
        return platforms_of(self.spec, self.options)

    def document(self) -> dict[str, Any]:
        """As JSON, for `--dry-run --json`."""
        mirror = self.spec.image.base_image
        digest = (mirror.partition("@")[2] or None) if mirror else self.base.digest
        return {
            "reference": self.reference,
            "references": list(self.references),
            "platforms": list(self.platforms),
            "base": {"key": self.base.key, "reference": mirror or self.base.reference, "digest": digest},
            "stack": self.stack.key,
            "dockerfile": self.rendered.dockerfile,
            "files": sorted([*self.rendered.files, *self.server]),
            "labels": self.rendered.labels,
            "forecast": self.forecast.document(),
            "findings": [vars(finding) for finding in self.findings],
            "steps": self.steps(),
        }

    def steps(self) -> list[str]:
        """What `run` would do, one line each."""
        options = self.options
        which = " (the engine's platform only)" if len(self.platforms) > 1 else ""
        return [
            f"build for {', '.join(self.platforms)} on {self.base.key} with {self.stack.key}",
            f"verify: start it, embed eight texts, compare with fp32{which}" if options.verify else "verify: skipped",
            *(f"tag {reference}" for reference in self.references),
            *([f"write {options.oci}"] if options.oci else []),
            *(f"push to {host}" for host in dict.fromkeys(map(host_of, self.references)) if options.push),
        ]


def platforms_of(spec: Spec, options: BuildOptions) -> tuple[str, ...]:
    """The platforms of the command line, else the one of the spec."""
    return options.platforms or (spec.image.platform,)


def plan(
    spec: Spec, base: BaseImage, stack: Stack, rendered: Rendered, server: Mapping[str, Path], options: BuildOptions
) -> BuildPlan:
    """Decide everything that needs no engine and no weights.

    Raises `UsageError` for a platform that does not exist and files that cannot be written, `InferctlError` for a
    floating revision, a secret in the Dockerfile, and an image too large.
    """
    from inferctl.model import is_hub_id

    _refuse_targets(options)
    if options.push and not options.references and not spec.image.repository:
        raise UsageError(
            f"--push needs a repository, and {spec.repository}:{rendered.tag} is a name on this machine only",
            "set `image.repository`, as in registry.example.com/team/name, or give `--tag`",
        )
    hub = is_hub_id(spec.model.source)
    findings = _judged(spec, base, stack, rendered, options, hub)
    baked = spec.model.weights == "bake"
    found = forecast.forecast(
        base,
        stack,
        locks=tuple(Path(name).stem for name in rendered.files if name.startswith("locks/")),
        wheels=wheel_sizes(rendered, Path(spec.image.wheels)) if spec.image.wheels else None,
        weights=_weights(spec) if baked else None,
        server=sum(file.stat().st_size for file in server.values()),
    )
    if options.max_bytes is not None:
        forecast.refuse_larger(found, options.max_bytes, stack.cuda)
        findings += [] if found.complete else [_unweighed(found)]
    references = options.references or (f"{spec.repository}:{rendered.tag}",)
    return BuildPlan(references, spec, base, stack, rendered, server, None, found, tuple(findings), options)


def _weights(spec: Spec) -> forecast.Part:
    """The weights that the image bakes: of the folder, of the hub's cache, or as the hub lists them."""
    from inferctl import hub, model

    source, revision = spec.model.source, spec.model.revision
    local = not model.is_hub_id(source)
    try:
        if folder := model.find(source) if local else hub.cached(source, revision):
            return forecast.Part("weights", folder.bytes, "the model folder")
        return forecast.Part("weights", hub.facts(source, revision).bytes, "the files that the hub lists")
    except InferctlError as error:
        return forecast.Part("weights", None, error.message)


def _judged(
    spec: Spec, base: BaseImage, stack: Stack, rendered: Rendered, options: BuildOptions, hub: bool
) -> list[fit.Finding]:
    """What is worth a warning; raises for what is not to be built."""
    told = fit.check_image(spec, base, stack, hub_model=hub, today=options.today, platforms=platforms_of(spec, options))
    told += lint.secrets_in_dockerfile(rendered.dockerfile)
    impossible = [f for f in told if f.level == "error" and f.topic in ("platform", "python")]
    if impossible:
        raise UsageError("\n".join(f"{f.what}: {f.why}" for f in impossible), impossible[0].hint)
    floats = spec.model.weights != "mount" and not options.allow_floating
    refuse([f for f in told if f.level == "error" or (f.topic == "revision" and floats)])
    return [f for f in told if f.level != "ok"]


def refuse(findings: list[fit.Finding]) -> None:
    """Raise `InferctlError` when there are any."""
    if findings:
        raise InferctlError("\n".join(f"{f.what}: {f.why}" for f in findings), findings[0].hint)


def _unweighed(found: forecast.Forecast) -> fit.Finding:
    why = f"nobody knows the size of {', '.join(found.unknown)}; the rest is {size(found.total)} compressed"
    return fit.Finding(
        "warn", "size", "--max-size is judged only once the image is built", why, "`--dry-run` lists the parts"
    )


def _refuse_targets(options: BuildOptions) -> None:
    inputs = [*options.secrets.values(), *filter(None, [options.spec_file])]
    for file, option in ((options.oci, "--output oci=FILE"), (options.metadata_file, "--metadata-file")):
        if file is not None:
            outputs.check(file, option, inputs=inputs)


def wheel_sizes(rendered: Rendered, folder: Path) -> dict[str, int]:
    """Closure -> bytes of its wheels in `folder`, for the closures whose every package has a wheel there."""
    largest: dict[tuple[str, str], int] = {}
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        key = (locks.normalise(name), version)
        largest[key] = max(largest.get(key, 0), wheel.stat().st_size)
    sizes = {}
    for file, text in rendered.files.items():
        if file.startswith("locks/"):
            wanted = locks.versions(text.decode()).items()
            if all(item in largest for item in wanted):
                sizes[Path(file).stem] = sum(largest[item] for item in wanted)
    return sizes
