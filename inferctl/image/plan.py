"""Plans a build without the Docker Engine. A dry run ends with the plan."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.config.settings import Resolved
from inferctl.config.spec import Model, Spec
from inferctl.core.errors import InferctlError, UsageError
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage, Stack
from inferctl.image import model_image, render
from inferctl.image.from_spec import missing_files, rendered_image
from inferctl.image.image_name import host_of
from inferctl.image.records import READY_SECONDS
from inferctl.image.render import Rendered
from inferctl.models import fit
from inferctl.models.hub import HubModel
from inferctl.models.model import ModelFolder, is_hub_id
from inferctl.models.size import locate
from inferctl.models.weights_folders import WeightsFolder, weights_folders


@dataclass(frozen=True)
class BuildOptions:
    """The options of `inferctl build`. `secrets`: id -> file. `today`: date for the end-of-life check.

    `references`: names of the image; without one, the name in the spec. `expected`: id that the built image must have,
    None for any.
    """

    push: bool = False
    verify: bool = True
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    secrets: Mapping[str, Path] = field(default_factory=dict)
    network: str | None = None
    allow_floating: bool = False
    expected: str | None = None
    no_cache: bool = False
    pull: bool = False
    provenance: bool = True
    sbom: bool = True
    ready_seconds: float = READY_SECONDS
    today: datetime.date = field(default_factory=datetime.date.today)


@dataclass(frozen=True)
class BuildPlan:
    """The plan of a build.

    `references`: at least one name of the image, with tag. `tasks`: of each model, `auto` while it is not on this
    machine. `server_files`: the server's own files, by their path in the image. `folders`: of the weights that the
    image bakes or that the verification mounts, by name. `plan` sets none, because a dry run needs no weights.
    """

    references: tuple[str, ...]
    spec: Spec
    base: BaseImage
    stack: Stack
    tasks: Mapping[str, str]
    rendered: Rendered
    server_files: Mapping[str, Path]
    folders: Mapping[str, Path]
    findings: tuple[fit.Finding, ...]
    options: BuildOptions

    @property
    def reference(self) -> str:
        """The first name of the image."""
        return self.references[0]

    @property
    def needed(self) -> list[WeightsFolder]:
        """What `run` needs on this machine: local folders to bake, and weights to mount for the verification."""
        return [
            each
            for each in weights_folders(self.spec)
            if (each.weights == "mount" and self.options.verify) or each.stage in self.rendered.contexts
        ]

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON data, for `--dry-run --json`."""
        mirror = self.spec.image.base_image
        digest = (mirror.partition("@")[2] or None) if mirror else self.base.digest
        return {
            "reference": self.reference,
            "references": list(self.references),
            "platforms": [self.spec.image.platform],
            "base": {"key": self.base.key, "reference": mirror or self.base.reference, "digest": digest},
            "stack": self.stack.key,
            "dockerfile": self.rendered.dockerfile,
            "files": sorted([*self.rendered.files, *self.server_files]),
            "labels": self.rendered.labels,
            "findings": [vars(finding) for finding in self.findings],
            "steps": self.steps(),
        }

    def steps(self) -> list[str]:
        """Return the steps of `run`, one line per step."""
        options = self.options
        return [
            f"build for {self.spec.image.platform} on {self.base.key} with {self.stack.key}",
            "verify: start the image, send eight texts, compare with fp32" if options.verify else "verify: skipped",
            *(f"tag {reference}" for reference in self.references),
            *(f"push to {host}" for host in dict.fromkeys(map(host_of, self.references)) if options.push),
        ]


def plan(resolved: Resolved, options: BuildOptions) -> BuildPlan:
    """Plan a build, without the engine and without weights.

    Raises `UsageError` for an unavailable platform, `InferctlError` for an unpinned revision.
    """
    spec = resolved.spec
    base = catalog.base(spec.image.base)
    stack, rendered = catalog.stack(base.stack), rendered_image(resolved)
    server_files = render.server_files(spec.image.embed)
    if options.push and not options.references and not spec.image.repository:
        raise UsageError(
            f"--push requires a repository: {spec.repository}:{rendered.tag} is a local name",
            "set `image.repository`, such as registry.example.com/team/name, or pass `--tag`",
        )
    findings = _check(spec, base, stack, options)
    for each in spec.each():
        if each.model.weights == "bake":
            _refuse_pickles(each)
    references = options.references or (f"{spec.repository}:{rendered.tag}",)
    tasks = {each.name: str(each.task) for each in rendered.folders if each.base is None}
    return BuildPlan(references, spec, base, stack, tasks, rendered, server_files, {}, tuple(findings), options)


def _refuse_pickles(spec: Spec) -> None:
    """Raise `UsageError` for weights to bake that are pickles. A model that is not known yet is found by the build."""
    found = None
    with contextlib.suppress(InferctlError):
        found = locate(spec, model_image.facts)
    pickled = found.converted if isinstance(found, ModelFolder) else isinstance(found, HubModel) and found.pickled
    if pickled:
        raise UsageError(
            f"{spec.model.source} cannot be served as it is on the hub, and a build does not convert it",
            f"run `inferctl convert {spec.model.source} NEW_FOLDER`, and set `model.source: NEW_FOLDER`",
        )


def _check(spec: Spec, base: BaseImage, stack: Stack, options: BuildOptions) -> list[fit.Finding]:
    """Return the warnings about the image. Raises an error for findings that prevent the build."""
    findings, unpinned, models = list(missing_files(spec, base)), [], {each.name: each for each in spec.each()}
    for each in weights_folders(spec):
        model = Model.model_construct(source=each.source, revision=each.revision, weights=each.weights)
        alone = models.get(each.name) or spec.model_copy(update={"model": model})  # an adapter is pinned as a model
        found = fit.check_image(alone, base, stack, hub_model=is_hub_id(each.source), today=options.today)
        findings += [finding for finding in found if finding not in findings]
        if each.weights != "mount" and not options.allow_floating:
            unpinned += [finding for finding in found if finding.topic == "revision"]
    wrong = [f for f in findings if f.level == "error" and f.topic in ("platform", "python", "locks", "wheels")]
    if wrong:
        raise UsageError("\n".join(f"{f.what}: {f.why}" for f in wrong), wrong[0].hint)
    raise_for([f for f in findings if f.level == "error" or f in unpinned])
    return [f for f in findings if f.level != "ok"]


def raise_for(findings: list[fit.Finding]) -> None:
    """Raise `InferctlError` if there are findings."""
    if findings:
        raise InferctlError("\n".join(f"{f.what}: {f.why}" for f in findings), findings[0].hint)
