"""`inferctl build`: plan, build, verify, tag, push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import completion, console
from inferctl.cli.options import Json, ModelSource, PrecisionOption, SpecFile, load, network_of

if TYPE_CHECKING:
    from inferctl.image.build import Built
    from inferctl.image.plan import BuildPlan
    from inferctl.image.verify import Verified


def build(
    spec_file: SpecFile = None,
    model: ModelSource = None,
    precision: PrecisionOption = None,
    base: Annotated[
        str | None,
        typer.Option(autocompletion=completion.BASES, help="Base image: an entry of `inferctl catalog bases`."),
    ] = None,
    base_image: Annotated[str | None, typer.Option(help="Your mirror of the base image, best with a digest.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", "-t", metavar="NAME", help="Name the image; repeatable. Default: from the spec."),
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Push once it is verified.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, Dockerfile and size forecast; build nothing.")
    ] = False,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Refuse to build an image forecast to be larger, as in 6GB.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Start the image and check its vectors before it gets its name."),
    ] = True,
    ready_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=86_400, help="How long the image may take to be ready.")
    ] = 300.0,
    lint_layers: Annotated[
        bool, typer.Option("--lint/--no-lint", help="Look for bytes wasted in the image's layers.")
    ] = True,
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", autocompletion=completion.PLATFORMS, help="Platforms, as in linux/amd64,linux/arm64."
        ),
    ] = None,
    cache_to: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Export the build cache: a registry name (mode max), or type=..."),
    ] = None,
    cache_from: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Import a build cache: a registry name, or type=...")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="oci=FILE", help="Write the image as an OCI archive too.")
    ] = None,
    metadata_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write digest and names as JSON, as buildx does.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Publish only this image: fail if the build produces another id."),
    ] = None,
    builder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Build with this builder of `docker buildx ls`.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every build step again.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Ask the registry for a newer base image.")] = False,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Add a label to the image (repeatable).")
    ] = None,
    pip_conf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="pip's configuration with your index, as a build secret.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate authorities, as a build secret.")] = None,
    hf_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token for gated hub models, as a build secret.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.one_of("host"),
            help="`host`: build steps and the verification use the host's network.",
        ),
    ] = None,
    allow_floating: Annotated[
        bool, typer.Option("--allow-floating", help="Build although the hub model has no commit.")
    ] = False,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Attach provenance where the builder can.")
    ] = True,
    sbom: Annotated[bool, typer.Option("--sbom/--no-sbom", help="Attach an SBOM where the builder can.")] = True,
    as_json: Json = False,
) -> None:
    """Build the image of the spec, verify it, tag it, and with --push publish every tag; prints its name@digest or id.

    Example: inferctl build --push --max-size 6GB
    """
    from inferctl import catalog, render
    from inferctl.cli.render import rendered_image
    from inferctl.errors import UsageError
    from inferctl.image.plan import BuildOptions, plan
    from inferctl.sizes import parse_size

    flags = {"model.source": model, "serve.precision": precision, "image.base": base, "image.base_image": base_image}
    resolved = load(spec_file, {**flags, "image.max_size": max_size})
    spec = resolved.spec
    secrets = {"pip_conf": pip_conf, "ca": ca, "hf_token": hf_token_file}
    for name, file in secrets.items():
        if file is not None and not file.is_file():
            raise UsageError(f"the file {file} for the build secret {name} is not there", "check the path")
    options = BuildOptions(
        push=push,
        verify=verify,
        lint_layers=lint_layers,
        platforms=platforms_of(platform) if platform is not None else (),
        cache_to=tuple(cache_to or ()),
        cache_from=tuple(cache_from or ()),
        oci=oci_file(output) if output is not None else None,
        metadata_file=metadata_file,
        spec_file=Path(resolved.file) if resolved.file else None,
        references=tuple(dict.fromkeys(map(tag_reference, tag or ()))),
        secrets={name: file for name, file in secrets.items() if file is not None},
        network=network_of(network),
        allow_floating=allow_floating,
        max_bytes=parse_size(spec.image.max_size) if spec.image.max_size else None,
        expected=expect,
        builder=builder,
        no_cache=no_cache,
        pull=pull,
        provenance=provenance,
        sbom=sbom,
        ready_seconds=ready_timeout,
    )
    chosen = catalog.base(spec.image.base)
    made = plan(
        spec,
        chosen,
        catalog.stack(chosen.stack),
        rendered_image(resolved, labels_of(label or [])),
        render.server_files(),
        options,
    )
    for finding in made.findings:
        console.warn(finding.text())
    if dry_run:
        _print_plan(made, as_json)
        return
    built = _run(made)
    _print(built, as_json)


def labels_of(given: list[str]) -> dict[str, str]:
    """`KEY=VALUE` texts -> labels. Raises `UsageError`."""
    import re

    from inferctl.errors import UsageError

    made = {}
    for text in given:
        key, equals, value = text.partition("=")
        reserved = key.startswith(("io.inferctl.", "org.opencontainers.image."))
        if not equals or reserved or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?", key):
            raise UsageError(
                f"--label {text!r} is not a label that can be set",
                "write KEY=VALUE, as in team=search; inferctl sets `io.inferctl.` and `org.opencontainers.image.`",
            )
        made[key] = value
    return made


def platforms_of(text: str) -> tuple[str, ...]:
    """`linux/amd64, linux/arm64` -> its platforms. Raises `UsageError`."""
    import re

    from inferctl.errors import UsageError
    from inferctl.spec import PLATFORM

    found = tuple(part.strip() for part in text.split(","))
    for part in found:
        if not re.fullmatch(PLATFORM, part):
            raise UsageError(
                f"--platform {text!r}: {part!r} is not a platform", "as in `--platform linux/amd64,linux/arm64`"
            )
    return found


def oci_file(text: str) -> Path:
    """`oci=FILE` or `type=oci,dest=FILE` -> FILE. Raises `UsageError`."""
    from inferctl.errors import UsageError

    fields = dict(part.partition("=")[::2] for part in text.split(","))
    file = fields.get("oci") or (fields.get("dest") if fields.get("type") == "oci" else None)
    if not file:
        raise UsageError(f"--output {text!r} is not understood", "write it as oci=FILE or type=oci,dest=FILE")
    return Path(file)


def show_verified(found: Verified) -> None:
    """Say on stderr what a verification found."""
    near = (
        f"cosine to fp32 at least {found.cosine_min:.6f}" if found.cosine_min is not None else "not compared with fp32"
    )
    console.note(
        f"verified: {found.precision} ({found.level}) on {found.device}, "
        f"{found.texts} texts, {found.dimensions} dimensions, {near}"
    )


def tag_reference(text: str) -> str:
    """`full_reference` of a name that an image is given. Raises `UsageError` for a digest, which no one can choose."""
    from inferctl.errors import UsageError

    if "@" in text:
        raise UsageError(f"--tag {text!r} has a digest", "give a name and a tag: the digest follows from the image")
    return full_reference(text)


def full_reference(text: str) -> str:
    """`name` -> `name:latest`; one with a tag or a digest as it is. Raises `UsageError` for what is no image name."""
    import re

    from inferctl.errors import UsageError
    from inferctl.spec import IMAGE_NAME, IMAGE_TAG

    if not re.fullmatch(rf"{IMAGE_NAME}(?::{IMAGE_TAG})?(?:@sha256:[0-9a-f]{{64}})?", text):
        raise UsageError(
            f"{text!r} is not an image name", "as in registry.example.com/team/name:tag, all lower case but the tag"
        )
    return text if "@" in text or ":" in text.rpartition("/")[2] else f"{text}:latest"


def _run(made: BuildPlan) -> Built:
    import sys
    from dataclasses import replace

    from inferctl import model
    from inferctl.cli import download
    from inferctl.cli.buildview import BuildView
    from inferctl.image import build as building
    from inferctl.image.docker import DockerEngine
    from inferctl.model import is_hub_id

    source, revision = made.spec.model.source, made.spec.model.revision
    if made.needs_model and not is_hub_id(source):
        made = replace(made, model=model.find(source).path)
    engine = DockerEngine.connect()
    if made.needs_model and made.model is None:
        made = replace(made, model=download.fetch(source, revision).path)
    with BuildView(live=sys.stderr.isatty()) as view:
        return view.follow(building.run(made, engine, engine.info()))


def _print_plan(made: BuildPlan, as_json: bool) -> None:
    from inferctl.sizes import size

    if as_json:
        console.document(made.document())
        return
    total = f"{'' if made.forecast.complete else 'at least '}{size(made.forecast.total)} compressed"
    lines = [*made.references, *(f"  {step}" for step in made.steps()), "", f"size forecast: {total}"]
    lines += [f"  {line}" for line in made.forecast.lines()]
    console.data("\n".join([*lines, "", made.rendered.dockerfile]))


def _print(built: Built, as_json: bool) -> None:
    from inferctl.cli.buildview import short
    from inferctl.sizes import size

    for layer in built.layers:
        if layer.size:
            console.note(f"  {size(layer.size):>10}  {short(layer.created_by)}")
    for finding in built.findings:
        console.warn(finding.text())
    if built.verified:
        show_verified(built.verified)
    sizes = f"{size(built.size)} uncompressed"
    sizes += f", {size(built.compressed)} compressed" if built.compressed is not None else ""
    sizes += f", {size(built.pushed)} pushed" if built.pushed is not None else ""
    console.note(f"{', '.join(built.references)}: {sizes}")
    if as_json:
        console.document(built.document())
    else:
        # Tags of one repository share a digest.
        console.data("\n".join(dict.fromkeys(built.digests)) or built.image)
