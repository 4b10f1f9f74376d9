"""What a build will do, decided before the engine is asked: all of a dry run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferctl import locks
from inferctl.errors import InferctlError
from inferctl.image import forecast, lint
from inferctl.image.push import ATTEMPTS
from inferctl.image.reference import host_of
from inferctl.image.verify import READY_SECONDS

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack
    from inferctl.render import Rendered
    from inferctl.spec import Spec


@dataclass(frozen=True)
class BuildOptions:
    """What the command line says. `secrets`: id -> file. `today` decides what is past its end of life."""

    push: bool = False
    verify: bool = True
    lint_layers: bool = True
    platforms: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    oci: Path | None = None
    metadata_file: Path | None = None
    reference: str | None = None
    secrets: Mapping[str, Path] = field(default_factory=dict)
    network: str | None = None
    allow_floating: bool = False
    max_bytes: int | None = None
    provenance: bool = True
    sbom: bool = True
    ready_seconds: float = READY_SECONDS
    attempts: int = ATTEMPTS
    today: datetime.date = field(default_factory=datetime.date.today)


@dataclass(frozen=True)
class BuildPlan:
    """Everything decided before the engine is asked. `model`: folder of the weights here, None when they come from a hub."""

    reference: str
    spec: Spec
    base: BaseImage
    stack: Stack
    rendered: Rendered
    server: Mapping[str, Path]
    model: Path | None
    forecast: forecast.Forecast
    findings: tuple[lint.Finding, ...]
    options: BuildOptions

    def document(self) -> dict[str, Any]:
        """As JSON, for `--dry-run --json`."""
        return {
            "reference": self.reference,
            "base": {"key": self.base.key, "reference": self.base.reference, "digest": self.base.digest},
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
        platforms = ", ".join(options.platforms) or "the engine's platform"
        return [
            f"build for {platforms} on {self.base.key} with {self.stack.key}",
            "verify: start it, embed eight texts, compare with fp32" if options.verify else "verify: skipped",
            f"tag {self.reference}",
            *([f"write {options.oci}"] if options.oci else []),
            *([f"push to {host_of(self.reference)}"] if options.push else []),
        ]


def plan(
    spec: Spec, base: BaseImage, stack: Stack, rendered: Rendered, server: Mapping[str, Path], options: BuildOptions
) -> BuildPlan:
    """Decide everything that needs no engine. Raises for a refused lint, a refused size, and local weights that are not there."""
    from inferctl import model
    from inferctl.model import is_hub_id

    hub = is_hub_id(spec.model.source)
    # A builder without the weights can still build an image that mounts them; only verifying it takes them.
    wanted = {"bake": not hub, "mount": options.verify, "download": False}[spec.model.weights]
    folder = model.find(spec.model.source, spec.model.revision).path if wanted else None
    findings = lint.plan(spec, base, stack, rendered.dockerfile, options.today, hub_model=hub)
    refused = [f for f in lint.errors(findings) if not (f.code == "floating-model" and options.allow_floating)]
    if refused:
        raise InferctlError("\n".join(f"{f.message}: {f.reason}" for f in refused), refused[0].fix)
    weights = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder else None
    found = forecast.forecast(
        base,
        stack,
        locks=tuple(Path(name).stem for name in rendered.files if name.startswith("locks/")),
        wheels=wheel_sizes(rendered, Path(spec.image.wheels)) if spec.image.wheels else None,
        weights=weights,
        baked=spec.model.weights == "bake",
        server=sum(file.stat().st_size for file in server.values()),
    )
    if options.max_bytes is not None:
        forecast.refuse_larger(found, options.max_bytes, stack.cuda)
    reference = options.reference or spec.image_reference()
    return BuildPlan(reference, spec, base, stack, rendered, server, folder, found, tuple(findings), options)


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
