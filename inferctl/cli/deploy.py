"""`inferctl deploy`: write Kubernetes manifests from specs, clusters and receipts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, deploy_explain, deploy_files, deploy_lint, deploy_preview, options
from inferctl.cli.lazy import Command
from inferctl.config.deploy_spec import DNS_NAME
from inferctl.config.settings import Resolved
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import clusters, planning
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.explain import document
from inferctl.deploy.objects.embed import EmbedRun
from inferctl.deploy.plan import DeploymentPlan
from inferctl.deploy.planning import SpecSource
from inferctl.image import model_image
from inferctl.manifests import versions
from inferctl.models import fit, generation_fit, hub
from inferctl.models.model import resolve_task
from inferctl.models.size import locate, size_of

EPILOG = """\b
Examples:
  # Show the arithmetic: replicas, overflow and probes
  inferctl deploy --explain
  # Write the manifests of two models
  inferctl deploy -f embed.yaml -f generate.yaml --output manifests
  # Apply those of one cluster
  kubectl apply -k manifests/overlays/aws-eu-central-1
  # Show where its pods fit on given nodes, what a spike evicts and what a loss costs
  inferctl deploy --preview nodes.yaml manifests
  # Write a Job for the files of the claim `texts`: arguments of `inferctl embed` follow `--`
  inferctl deploy --embed texts --parts 64 --output job -- 'in/*.parquet' --output out
  # Check manifests of yours or of others, also for the code scanning of a forge
  inferctl deploy --lint manifests other.yaml --json
"""


def deploy(
    manifests: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MANIFEST]...",
            help="With --lint or --preview: files, folders or a kustomize tree; --lint: `-` is stdin. [default with "
            "--preview: those of the specs] With --embed: arguments of `inferctl embed`, after `--`.",
            show_default=False,
        ),
    ] = None,
    spec_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--spec", "-f", metavar="FILE", help="Read this spec file; repeatable. [default: ./inferctl.yaml]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write the manifests to DIR, for kustomize.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each derived number with its formula and source.")
    ] = False,
    clusters_file: Annotated[
        Path | None,
        typer.Option("--clusters", metavar="FILE", help="Read the clusters from FILE. [default: the spec's]"),
    ] = None,
    kubernetes_version: Annotated[
        str | None,
        typer.Option(metavar="1.NN", help="Write for this version of Kubernetes. [default: that of each cluster]"),
    ] = None,
    nodes: Annotated[
        list[Path] | None,
        typer.Option(
            "--preview", metavar="NODES", help="Show where pods fit, what a spike evicts and a loss costs; repeatable."
        ),
    ] = None,
    lint: Annotated[
        bool, typer.Option("--lint", help="Check manifests: exit code 1 if a finding is an error.")
    ] = False,
    embed: Annotated[
        str | None, typer.Option(metavar="CLAIM", help="Write a Job that embeds files of this PersistentVolumeClaim.")
    ] = None,
    parts: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=99_999, help="Make N parts. [default: the most replicas]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write Kubernetes manifests from specs, the clusters file and measured receipts."""
    if lint:
        if nodes or explain or output or spec_files or clusters_file or embed:
            raise UsageError("--lint checks manifests only", "pass specs, clusters and other modes without `--lint`")
        if not manifests:
            raise UsageError("no manifests to check", "name the manifests, as in `inferctl deploy --lint manifests`")
        deploy_lint.run([Path(each) for each in manifests], version=kubernetes_version, as_json=as_json)
        return
    run = _embed_run(embed, parts, manifests or [])
    if nodes or (manifests and not run):
        files = [Path(each) for each in manifests or ()]
        _preview(nodes, files, spec_files, clusters_file, kubernetes_version, output, explain, as_json)
        return
    if output is None and not explain and not as_json:
        raise UsageError(
            "nothing to do: none of --output, --explain, --preview, --lint and --json is given",
            "pass `--output DIR` to write the manifests, or `--explain` to see the arithmetic",
        )
    plan = _plan(spec_files, clusters_file, kubernetes_version, images=output is not None)
    for warning in plan.all_warnings:
        console.warn(warning)
    written: list[str] = []
    if output is not None:
        written = deploy_files.write(plan, output, run)
    if as_json:
        console.document(document(plan) | ({"output": str(output), "files": written} if output else {}))
        return
    if explain:
        deploy_explain.report(plan)
    if output is not None:
        names = [cluster.name for cluster in plan.clusters]
        which, of = (names[0], "") if len(names) == 1 else ("NAME", f" (NAME: {', '.join(names)})")
        command = f"kubectl apply -k {output}/{'embed' if run else 'overlays'}/{which}"
        console.note(f"wrote {len(written)} files to {output}; apply a cluster with `{command}`{of}")


def _embed_run(claim: str | None, parts: int | None, arguments: list[str]) -> EmbedRun | None:
    if claim is None and parts is None:
        return None
    if not claim or not arguments:
        raise UsageError(
            "--embed needs the name of a claim, and arguments of `inferctl embed` after `--`",
            "as in `inferctl deploy --embed texts --output job -- 'in/*.parquet' --output out`",
        )
    if not re.fullmatch(DNS_NAME, claim):
        raise UsageError(f"--embed {claim!r} is not a name of a claim", "name a PersistentVolumeClaim of the namespace")
    command = Command("inferctl.cli.embed", "embed", "").build("embed")
    if not command.make_context("inferctl embed", [*arguments]).params["output"]:
        raise UsageError("the arguments after `--` have no --output", "name a folder of the claim: `--output out`")
    return EmbedRun(claim, tuple(arguments), parts)


def _preview(
    nodes: list[Path] | None,
    manifests: list[Path] | None,
    spec_files: list[Path] | None,
    clusters_file: Path | None,
    version: str | None,
    output: Path | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Print the preview of `manifests`, else of those of the specs. Raises `typer.Exit` with its exit code."""
    if not nodes:
        name = manifests[0] if manifests else ""
        raise UsageError(f"{name} is read only with --lint or --preview", "pass `--lint`, or `--preview NODES`")
    if output or explain:
        raise UsageError("--preview cannot be combined with --output or --explain", "run the command twice")
    if manifests and spec_files:
        raise UsageError("the preview is of manifests or of specs, not of both", "remove `--spec` or the manifests")
    if manifests:
        code = deploy_preview.preview(nodes, manifests, as_json=as_json)
    else:
        code = deploy_preview.of_plan(_plan(spec_files, clusters_file, version), nodes, as_json=as_json)
    raise typer.Exit(code)


def _plan(
    spec_files: list[Path] | None, clusters_file: Path | None, version: str | None, *, images: bool = True
) -> DeploymentPlan:
    files: list[Path | None] = [*spec_files] if spec_files else [None]
    found = [options.load(file, {}, several=True) for file in files]
    sources = [_source(each) for each in found]
    return planning.make_plan(sources, _clusters(sources, clusters_file), _checked(version), images=images)


def _checked(version: str | None) -> str | None:
    try:
        return versions.tested(version) if version is not None else None
    except UsageError as error:
        raise UsageError(f"--kubernetes-version: {error.message}", error.hint) from None


def _source(resolved: Resolved) -> SpecSource:
    """Return a spec with what is known about its models. Raises `UsageError` if a task is not known."""
    models = tuple(_model_source(each, resolved.file) for each in resolved.spec.each())
    return planning.of_several(resolved.spec, models) if resolved.spec.models else models[0]


def _model_source(spec: Spec, file: str | None) -> SpecSource:
    folder = Path(file).parent if file else Path()
    size: fit.ModelSize | fit.UnknownSize
    try:
        found = locate(spec, model_image.facts)
        size = size_of(found, generation_fit.check_adapters(spec, found)[0], spec.serve)
    except UsageError as error:
        size = fit.UnknownSize(error.message, error.hint or "")
    if isinstance(size, fit.ModelSize):
        task = resolve_task(spec.model.task, size, spec.model.source)
        local = hub.cached(spec.model.source, spec.model.revision)
        return SpecSource(spec, folder, size, task, (lambda: local.digest) if local else None, file)
    console.warn(f"{spec.name}: whether the model fits was not checked: {size.why}")
    if spec.model.task == "auto":
        raise UsageError(
            f"the task of {spec.name} is not known, because {size.why}",
            "set model.task: embed, rerank, classify or generate",
        )
    return SpecSource(spec, folder, size, spec.model.task, file=file)


def _clusters(sources: list[SpecSource], file: Path | None) -> tuple[Cluster, ...]:
    """Return the clusters of `--clusters`, else of the specs, else one cluster with the defaults."""
    if file is not None:
        return clusters.read(file)
    named = {
        (source.folder / Path(source.spec.deploy.clusters).expanduser()).resolve(): source
        for source in sources
        if source.spec.deploy.clusters
    }
    if len(named) > 1:
        raise UsageError("the specs name several clusters files", "pass `--clusters FILE`")
    return clusters.read(next(iter(named))) if named else clusters.default()
