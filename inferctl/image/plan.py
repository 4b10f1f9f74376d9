"""Plans a build without the Docker Engine. A dry run ends with the plan."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.config.spec import Spec
from inferctl.core import outputs
from inferctl.core.errors import InferctlError, UsageError
from inferctl.core.sizes import size
from inferctl.facts.catalog import BaseImage, Stack
from inferctl.image import lint, locks, model_image, size_forecast
from inferctl.image.from_spec import local_model, task_of
from inferctl.image.image_name import host_of
from inferctl.image.records import ATTEMPTS, READY_SECONDS
from inferctl.image.render import Rendered
from inferctl.models import fit
from inferctl.models.image_source import is_image
from inferctl.models.model import ModelFolder, is_hub_id
from inferctl.models.size import locate


@dataclass(frozen=True)
class BuildOptions:
    """The options of `inferctl build`. `secrets`: id -> file. `today`: date for the end-of-life check.

    `references`: names of the image; without one, the name in the spec. `expected`: id that the built image must have,
    None for any.
    """

    push: bool = False
    verify: bool = True
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
    """The plan of a build.

    `references`: at least one name of the image, with tag. `task` is `auto` while the model is not on this machine.
    `server_files`: the server's own files, by their path in the image. `model`: folder of the weights that the image
    bakes or that the verification mounts. `plan` sets None, because a dry run needs no weights.
    """

    references: tuple[str, ...]
    spec: Spec
    base: BaseImage
    stack: Stack
    task: str
    rendered: Rendered
    server_files: Mapping[str, Path]
    model: Path | None
    forecast: size_forecast.SizeForecast
    findings: tuple[fit.Finding, ...]
    options: BuildOptions

    @property
    def reference(self) -> str:
        """The first name of the image."""
        return self.references[0]

    @property
    def needs_model(self) -> bool:
        """Whether `run` needs local weights: to bake a folder, or to mount them for the verification."""
        weights = self.spec.model.weights
        return (weights == "mount" and self.options.verify) or (weights == "bake" and "model" in self.rendered.contexts)

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms to build for, such as `linux/amd64`."""
        return platforms_of(self.spec, self.options)

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON data, for `--dry-run --json`."""
        mirror = self.spec.image.base_image
        digest = (mirror.partition("@")[2] or None) if mirror else self.base.digest
        return {
            "reference": self.reference,
            "references": list(self.references),
            "platforms": list(self.platforms),
            "base": {"key": self.base.key, "reference": mirror or self.base.reference, "digest": digest},
            "stack": self.stack.key,
            "dockerfile": self.rendered.dockerfile,
            "files": sorted([*self.rendered.files, *self.server_files]),
            "labels": self.rendered.labels,
            "forecast": self.forecast.document(),
            "findings": [vars(finding) for finding in self.findings],
            "steps": self.steps(),
        }

    def steps(self) -> list[str]:
        """Return the steps of `run`, one line per step."""
        options = self.options
        scope = " (the engine's platform only)" if len(self.platforms) > 1 else ""
        return [
            f"build for {', '.join(self.platforms)} on {self.base.key} with {self.stack.key}",
            f"verify: start the image, send eight texts, compare with fp32{scope}"
            if options.verify
            else "verify: skipped",
            *(f"tag {reference}" for reference in self.references),
            *([f"write {options.oci}"] if options.oci else []),
            *(f"push to {host}" for host in dict.fromkeys(map(host_of, self.references)) if options.push),
        ]


def platforms_of(spec: Spec, options: BuildOptions) -> tuple[str, ...]:
    """Return the platforms of the command line, or by default the platform of the spec."""
    return options.platforms or (spec.image.platform,)


def plan(
    spec: Spec,
    base: BaseImage,
    stack: Stack,
    rendered: Rendered,
    server_files: Mapping[str, Path],
    options: BuildOptions,
) -> BuildPlan:
    """Plan a build, without the engine and without weights.

    Raises `UsageError` for an unavailable platform or a file that cannot be written, `InferctlError` for an unpinned
    revision, a secret in the Dockerfile, or a forecast above the size limit.
    """

    _check_outputs(options)
    if options.push and not options.references and not spec.image.repository:
        raise UsageError(
            f"--push requires a repository: {spec.repository}:{rendered.tag} is a local name",
            "set `image.repository`, such as registry.example.com/team/name, or pass `--tag`",
        )
    hub = is_hub_id(spec.model.source)
    findings = _check(spec, base, stack, rendered, options, hub)
    baked = spec.model.weights == "bake"
    forecast = size_forecast.forecast(
        base,
        stack,
        locks=tuple(
            Path(name).stem for name, text in rendered.files.items() if name.startswith("locks/") and b"==" in text
        ),
        wheels=wheel_sizes(rendered, Path(spec.image.wheels)) if spec.image.wheels else None,
        weights=_weights(spec) if baked else None,
        server=sum(file.stat().st_size for file in server_files.values()),
        zstd=spec.image.compression == "zstd",
        base_image=spec.image.base_image,
    )
    if options.max_bytes is not None:
        size_forecast.check_limit(forecast, options.max_bytes, stack.cuda)
        findings += [] if forecast.complete else [_incomplete_forecast(forecast)]
    references = options.references or (f"{spec.repository}:{rendered.tag}",)
    task = task_of(spec, local_model(spec))
    return BuildPlan(
        references, spec, base, stack, task, rendered, server_files, None, forecast, tuple(findings), options
    )


def _weights(spec: Spec) -> size_forecast.ImagePart:
    """Return the size of the baked weights: of the folder, in a cache, or as listed by the hub or the registry."""

    source = spec.model.source
    try:
        found = locate(spec, model_image.facts)
    except InferctlError as error:
        return size_forecast.ImagePart("weights", None, error.message)
    if isinstance(found, fit.UnknownSize):
        return size_forecast.ImagePart("weights", None, found.why)
    if found.converted if isinstance(found, ModelFolder) else found.pickled:
        raise UsageError(
            f"{source} cannot be served as it is on the hub, and a build does not convert it",
            f"run `inferctl convert {source} NEW_FOLDER`, and set `model.source: NEW_FOLDER`",
        )
    if isinstance(found, ModelFolder):
        place = "the files in the cache" if is_image(source) or is_hub_id(source) else "the model folder"
    else:
        place = "the files in the registry" if is_image(source) else "the files on the hub"
    return size_forecast.ImagePart("weights", found.bytes, place)


def _check(
    spec: Spec, base: BaseImage, stack: Stack, rendered: Rendered, options: BuildOptions, hub: bool
) -> list[fit.Finding]:
    """Return the warnings about the image. Raises an error for findings that prevent the build."""
    findings = fit.check_image(
        spec, base, stack, hub_model=hub, today=options.today, platforms=platforms_of(spec, options)
    )
    findings += lint.secrets_in_dockerfile(rendered.dockerfile)
    impossible = [f for f in findings if f.level == "error" and f.topic in ("platform", "python")]
    if impossible:
        raise UsageError("\n".join(f"{f.what}: {f.why}" for f in impossible), impossible[0].hint)
    unpinned_is_error = spec.model.weights != "mount" and not options.allow_floating
    raise_for([f for f in findings if f.level == "error" or (f.topic == "revision" and unpinned_is_error)])
    return [f for f in findings if f.level != "ok"]


def raise_for(findings: list[fit.Finding]) -> None:
    """Raise `InferctlError` if there are findings."""
    if findings:
        raise InferctlError("\n".join(f"{f.what}: {f.why}" for f in findings), findings[0].hint)


def _incomplete_forecast(forecast: size_forecast.SizeForecast) -> fit.Finding:
    unknown = ", ".join(forecast.unknown)
    why = f"the size of {unknown} is unknown; the other parts have {size(forecast.total)} (compressed)"
    return fit.Finding(
        "warn", "size", "image.max_size is checked only after the build", why, "`--dry-run` lists the parts"
    )


def _check_outputs(options: BuildOptions) -> None:
    """Raise `UsageError` if an output file cannot be written."""
    inputs = [*options.secrets.values(), *filter(None, [options.spec_file])]
    for file, option in ((options.oci, "--output oci=FILE"), (options.metadata_file, "--metadata-file")):
        if file is not None:
            outputs.check(file, option, inputs=inputs)


def wheel_sizes(rendered: Rendered, folder: Path) -> dict[str, int]:
    """Return the bytes of the wheels in `folder` by closure, for the closures with a wheel for each package."""
    largest: dict[tuple[str, str], int] = {}
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        key = (locks.normalize(name), version)
        largest[key] = max(largest.get(key, 0), wheel.stat().st_size)
    sizes = {}
    for file, text in rendered.files.items():
        if file.startswith("locks/"):
            wanted = locks.versions(text.decode()).items()
            if all(item in largest for item in wanted):
                sizes[Path(file).stem] = sum(largest[item] for item in wanted)
    return sizes
