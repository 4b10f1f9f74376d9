"""`inferctl build`: plan, build, verify, tag and push an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import build_view, console, download
from inferctl.cli.build_view import show_verified
from inferctl.cli.options import Flags, Json, Network, ReadySeconds, SpecFile, load, with_settings
from inferctl.core.errors import UsageError
from inferctl.core.sizes import size
from inferctl.image.from_spec import check_model_task, task_of
from inferctl.image.image_name import full_reference
from inferctl.models.image_source import is_image
from inferctl.models.model import is_hub_id
from inferctl.models.weights_folders import find

if TYPE_CHECKING:
    from inferctl.image.build import Built
    from inferctl.image.plan import BuildPlan


@with_settings("model.source", "serve.precision", "image.base", "image.base_image", "image.platform")
def build(
    flags: Flags,
    spec_file: SpecFile = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            "--tag", "-t", metavar="NAME", help="Tag the image with this name; repeatable. [default: from the spec]"
        ),
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Push the image after verification.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the Dockerfile; build nothing.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Start the image and compare its output with fp32 before it is tagged."
        ),
    ] = True,
    ready_timeout: ReadySeconds = 900.0,
    # Files that an earlier `inferctl init --ci` wrote pass `--no-lint`, which has no effect any more.
    _: Annotated[bool, typer.Option("--lint/--no-lint", hidden=True)] = True,
    cache_to: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Export the build cache to a registry name (mode max) or `type=...`."),
    ] = None,
    cache_from: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Import a build cache from a registry name or `type=...`.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Fail before any tag or push if the image has another id."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every build step without the cache.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Pull the base image again if its tag has moved.")] = False,
    pip_conf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pass this pip configuration as a build secret.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pass these certificate authorities as a build secret.")
    ] = None,
    hf_token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pass the hub token in FILE as a build secret, for gated models."),
    ] = None,
    network: Network = None,
    allow_floating: Annotated[
        bool, typer.Option("--allow-floating", help="Build although the revision of the hub model is not pinned.")
    ] = False,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Attach provenance if the builder supports it.")
    ] = True,
    sbom: Annotated[bool, typer.Option("--sbom/--no-sbom", help="Attach an SBOM if the builder supports it.")] = True,
    as_json: Json = False,
) -> None:
    """Build the image of the spec, verify it and tag it.

    Prints the image id or, with --push, the name@digest of each pushed tag.

    Example: inferctl build --push
    """
    from inferctl.image.plan import BuildOptions, plan

    resolved = load(spec_file, flags, several=True)
    secrets = {"pip_conf": pip_conf, "ca": ca, "hf_token": hf_token_file}
    for name, file in secrets.items():
        if file is not None and not file.is_file():
            raise UsageError(f"{file} not found (build secret {name})", "check the path")
    options = BuildOptions(
        push=push,
        verify=verify,
        cache_to=tuple(cache_to or ()),
        cache_from=tuple(cache_from or ()),
        references=tuple(dict.fromkeys(map(tag_reference, tag or ()))),
        secrets={name: file for name, file in secrets.items() if file is not None},
        network=network,
        allow_floating=allow_floating,
        expected=expect,
        no_cache=no_cache,
        pull=pull,
        provenance=provenance,
        sbom=sbom,
        ready_seconds=ready_timeout,
    )
    build_plan = plan(resolved, options)
    for finding in build_plan.findings:
        console.warn(finding.text())
    if dry_run:
        _print_plan(build_plan, as_json)
        return
    _print(_run(build_plan), as_json)


def tag_reference(text: str) -> str:
    """Return `full_reference` of a tag. Raises `UsageError` for a digest, because the image determines its digest."""
    if "@" in text:
        raise UsageError(f"image name {text!r} has a digest", "pass a name and a tag only: NAME:TAG")
    return full_reference(text)


def _run(build_plan: BuildPlan) -> Built:
    from inferctl.image import build as building
    from inferctl.image.docker import DockerEngine

    needed, models = build_plan.needed, {each.name: each for each in build_plan.spec.each()}
    folders = {
        each.name: find(each).path for each in needed if not is_hub_id(each.source) and not is_image(each.source)
    }
    engine, tasks = DockerEngine.connect(), dict(build_plan.tasks)
    for each in (one for one in needed if one.name not in folders):
        folder = download.weights(each)
        folders[each.name] = folder.path
        if each.base is None:  # before, the task of the model was unknown
            check_model_task(models[each.name], folder)
            tasks[each.name] = task_of(models[each.name], folder)
    build_plan = replace(build_plan, folders=folders, tasks=tasks)
    return build_view.follow(building.run(build_plan, engine, engine.info()))


def _print_plan(build_plan: BuildPlan, as_json: bool) -> None:
    lines = [*build_plan.references, *(f"  {step}" for step in build_plan.steps()), "", build_plan.rendered.dockerfile]
    console.result(build_plan.document(), "\n".join(lines), as_json=as_json)


def _print(built: Built, as_json: bool) -> None:
    for finding in built.findings:
        console.warn(finding.text())
    for result in built.verified:
        show_verified(result, several=len(built.verified) > 1)
    sizes = f"{size(built.size)} uncompressed"
    sizes += f", {size(built.compressed)} compressed" if built.compressed is not None else ""
    sizes += f" ({' and '.join(built.compressions)})" if built.compressions else ""
    console.note(f"{', '.join(built.references)}: {sizes}")
    # Tags of one repository share a digest.
    console.result(built.document(), "\n".join(dict.fromkeys(built.digests)) or built.image, as_json=as_json)
