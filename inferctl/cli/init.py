"""`inferctl init`: write a commented spec and, with `--ci`, a CI workflow that gates and publishes the image."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import typer

from inferctl.cli import completion, console, options
from inferctl.config import settings, spec
from inferctl.core import assets, document, outputs
from inferctl.core.errors import InferctlError, UsageError
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage
from inferctl.image import model_image
from inferctl.models import hub, image_source
from inferctl.models import model as model_folder
from inferctl.models.image_source import is_image
from inferctl.models.model import find, is_hub_id

_EXAMPLE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # an embedding model
_EXAMPLE = "inferctl[bench] @ git+https://git.example.com/team/inferctl@v0.1.0"
# Scripts that GitHub and GitLab share.
_PARTS = ("disk", "names", "build", "measure", "compare", "publish")
EPILOG = f"""\b
Examples:
  # Write a spec for a local model on a T4
  inferctl init --model ./models/all-MiniLM-L6-v2 --hardware t4
  # Write the GitHub workflow
  inferctl init --ci github --package '{_EXAMPLE}'
"""
_GITLAB_ROOT, _GITLAB_PART = ".gitlab-ci.yml", ".gitlab/inferctl.yml"
# CI -> path in the repository -> template.
_CI = {
    "github": {
        ".github/actions/inferctl/action.yml": "github-action.yml.j2",
        ".github/workflows/inferctl.yml": "github-workflow.yml.j2",
    },
    "gitlab": {_GITLAB_PART: "gitlab.yml.j2", _GITLAB_ROOT: "gitlab-ci.yml.j2"},
}


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files.")] = Path(),
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="SOURCE", help="Write this hub id or local model folder into the spec."),
    ] = _EXAMPLE_MODEL,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Set the name of the model. [default: from --model]")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            autocompletion=completion.BASES,
            help="Set the base image of `inferctl catalog bases`. [default: cuda13.0; vllm-cuda13.0 for generation; "
            "their CPU variants with --ci github]",
        ),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        options.hardware_option(
            "Set the target hardware; repeatable. [default: t4 and half an A100; cpu for a CPU base]"
        ),
    ] = None,
    ci: Annotated[Literal["github", "gitlab"] | None, typer.Option("--ci", help="Also write the CI workflow.")] = None,
    package: Annotated[
        str | None,
        typer.Option(metavar="REQUIREMENT", help="Install this pip requirement in the CI job; required with --ci."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite existing files; with --ci, never the spec.")
    ] = False,
) -> None:
    """Write a commented inferctl.yaml and print its path.

    If inferctl.yaml exists, the command fails. With --force, it overwrites the file.

    With --ci, it also writes a CI workflow, and keeps an existing inferctl.yaml.
    """
    target = directory / spec.DEFAULT_FILE
    installed = _requirement(package, ci)
    contents: dict[Path, str] = {}
    if not target.exists() or (force and ci is None):
        if is_image(model):
            image_source.reference(model)
        elif not is_hub_id(model) or Path(model).is_file():
            find(model)  # a path that is no model folder is an error
        if base is None:
            # GitHub's standard runners have 14 GB of disk. A CUDA image needs 25 GB.
            kind = "cpu" if ci == "github" and not hardware else "cuda13.0"
            base = f"vllm-{kind}" if _generates(model) else kind
            if ci == "github" and not hardware:
                console.note(f"the base is {base}, since a CUDA image does not fit a standard runner of GitHub")
        entry = catalog.bases().get(base)  # the check of the spec reports an unknown base
        values = {
            "name": name or spec.slug(model),
            "source": model if is_image(model) or is_hub_id(model) else _path_relative_to_spec(directory, model),
            "revision": None,
            "base": _file_relative_to_spec(directory, base),
            "hardware": [_file_relative_to_spec(directory, key) for key in hardware or _default_hardware(entry)],
            "generation": entry is not None and catalog.stack(entry.stack).vllm is not None,
        }
        contents[target] = _rendered("inferctl.yaml.j2", values)
    elif ci is None:
        raise UsageError(f"{target} already exists", "edit it, or pass `--force` to overwrite it")
    document = settings.parse(contents[target], str(target)) if contents else settings.read(target)
    # A name of `--name` is an error of this option, and not of a file that is not written yet.
    resolved = settings.resolve(document, {}, {"name": name} if contents else {}, catalog.vocabulary())
    if ci:
        job = {"name": resolved.spec.name, "repository": resolved.spec.image.repository, "package": installed}
        contents |= _ci_files(ci, directory, job, force)
    for file in contents:
        outputs.check(file, "inferctl init FOLDER", parents=True)
    for file, text in contents.items():
        outputs.write(file, text, "inferctl init FOLDER")
    if ci:
        console.note("next: read the comments on runners and registries in these files, then commit them")
    else:
        console.note("next: `inferctl check`, then `inferctl render` or `inferctl serve`")
    console.data("\n".join(str(file) for file in contents))


def _generates(source: str) -> bool:
    """Return whether a model is for generation; False if unknown. Asks the hub for one that is not on this machine."""
    if source == _EXAMPLE_MODEL:
        return False  # known without the hub
    found: model_folder.ModelFolder | hub.HubModel | None = hub.cached(source, None)
    if found is None and (is_image(source) or model_folder.is_hub_id(source)):
        try:
            found = model_image.facts(source) if is_image(source) else hub.facts(source, None)
        except InferctlError as error:
            console.warn(f"{error.message}. If the model is generative, pass `--base vllm-cuda13.0`")
    try:
        return found is not None and model_folder.resolve_task("auto", found, source) == "generate"
    except UsageError:  # a classifier
        return False


def _default_hardware(entry: BaseImage | None) -> list[str]:
    """Return the default hardware for images on a base."""
    cpu_only = entry is not None and catalog.stack(entry.stack).cuda is None
    return ["cpu"] if cpu_only else ["t4", "a100-40gb-mig-3g.20gb"]


def _path_relative_to_spec(directory: Path, path: str) -> str:
    """Return a path of the command line relative to the spec in `directory`, unless it is absolute."""
    if path.startswith(("/", "~")) or directory.resolve() == Path.cwd():
        return path
    relative = os.path.relpath(Path(path).absolute(), directory.resolve())
    return relative if relative.startswith("..") else f"./{relative}"


def _file_relative_to_spec(directory: Path, value: str) -> str:
    """Return a catalog key unchanged, and the path of a YAML file relative to the spec."""
    return _path_relative_to_spec(directory, value) if value.endswith((".yaml", ".yml")) else value


def _requirement(package: str | None, ci: str | None) -> str:
    """Return the pip requirement of the CI job as a quoted YAML string.

    There is no default because anybody can claim the name on a public index. Raises `UsageError`.
    """
    if ci is None and package is not None:
        raise UsageError("`--package` requires `--ci`", "add `--ci github` or `--ci gitlab`")
    if ci is not None and not (package or "").strip():
        raise UsageError(
            f"`--ci {ci}` requires `--package`: the requirement that installs inferctl in the job",
            f"pass a Git address, a wheel or a folder, such as `--package '{_EXAMPLE}'`",
        )
    return json.dumps((package or "").strip(), ensure_ascii=False)


def _ci_files(ci: str, directory: Path, job: dict[str, Any], force: bool) -> dict[Path, str]:
    """Return the files of a CI and their text, without an existing `.gitlab-ci.yml`, which belongs to the user."""
    values = {**job, "spec": spec.DEFAULT_FILE}
    parts = {part: _rendered(f"ci/{part}.sh.j2", values).rstrip() for part in _PARTS}
    files = {}
    for path, template in _CI[ci].items():
        file = directory / path
        if file.exists() and path == _GITLAB_ROOT:
            console.note(f"{file} exists and is not changed: add `include: [{{local: {_GITLAB_PART}}}]` to it")
            continue
        if file.exists() and not force:
            raise UsageError(f"{file} already exists", "edit it, or pass `--force` to overwrite it")
        files[file] = _rendered(f"ci/{template}", {**values, **parts})
    return files


def _rendered(template: str, values: dict[str, Any]) -> str:
    text = (assets.root() / "templates" / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["yaml"] = document.quoted
    return environment.from_string(text).render(values)
