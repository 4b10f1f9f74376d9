"""`inferctl init`: a commented spec to start from, and with `--ci` the files of a CI job that gates and publishes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from inferctl.cli import completion, console
from inferctl.errors import UsageError

_EXAMPLE = "inferctl[bench] @ git+https://git.example.com/team/inferctl@v0.1.0"
# Scripts that both CIs share.
_PARTS = ("names", "build", "measure", "compare", "publish")
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
    directory: Annotated[Path, typer.Argument(help="Folder to write into.")] = Path(),
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="SOURCE", help="Hub id or local model folder.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    name: Annotated[str | None, typer.Option(help="Name of the model; default is taken from its source.")] = None,
    base: Annotated[
        str, typer.Option(autocompletion=completion.BASES, help="Base image: an entry of `inferctl catalog bases`.")
    ] = "cuda13.0",
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=completion.HARDWARE,
            help="Set the hardware it must run on; repeatable. Default: t4 and half an A100, or cpu on a CPU base.",
        ),
    ] = None,
    ci: Annotated[
        str | None,
        typer.Option(
            "--ci",
            metavar="NAME",
            autocompletion=completion.one_of("github", "gitlab"),
            help="Also write the CI files: github or gitlab.",
        ),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(metavar="REQUIREMENT", help="Set what pip installs in the job; required with --ci."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are already there.")] = False,
) -> None:
    """Write a commented inferctl.yaml and print its path. With --ci, write the CI files too; an existing spec is kept.

    Examples: inferctl init --model ./models/all-MiniLM-L6-v2 --hardware t4;
    inferctl init --ci github --package 'inferctl[bench] @ git+https://git.example.com/team/inferctl@v0.1.0'
    """
    from inferctl import catalog, outputs, settings, spec
    from inferctl.model import is_hub_id

    target = directory / spec.DEFAULT_FILE
    if ci is not None and ci not in _CI:
        raise UsageError(f"--ci cannot be {ci!r}", f"known: {', '.join(_CI)}")
    installed = _requirement(package, ci)
    written: dict[Path, str] = {}
    if not target.exists() or (force and ci is None):
        values = {
            "name": name or spec.slug(model),
            "source": model if is_hub_id(model) else _seen_from(directory, model),
            "revision": None,
            "base": _file_seen_from(directory, base),
            "hardware": [_file_seen_from(directory, one) for one in hardware or _default_hardware(base)],
        }
        written[target] = _rendered("inferctl.yaml.j2", values)
    elif ci is None:
        raise UsageError(f"{target} is already there", "edit it, or overwrite it with --force")
    document = settings.parse(written[target], str(target)) if written else settings.read(target)
    resolved = settings.resolve(document, {}, {}, catalog.vocabulary())
    if ci:
        given = {"name": resolved.spec.name, "repository": resolved.spec.image.repository, "package": installed}
        written |= _ci_files(ci, directory, given, force)
    for file in written:
        outputs.check(file, "inferctl init FOLDER", parents=True)
    for file, text in written.items():
        outputs.write(file, text, "inferctl init FOLDER")
    if ci:
        console.note("next: read what they say about runners and registries, and commit them")
    else:
        console.note("next: `inferctl check`, then `inferctl render` or `inferctl serve`")
    console.data("\n".join(str(file) for file in written))


def _default_hardware(base: str) -> list[str]:
    """Hardware that images on `base` run on. A base that is not known is reported with the spec."""
    from inferctl import catalog

    known = catalog.bases().get(base)
    cpu_only = known is not None and catalog.stack(known.stack).cuda is None
    return ["cpu"] if cpu_only else ["t4", "a100-40gb-mig-3g.20gb"]


def _seen_from(directory: Path, path: str) -> str:
    """A path of the command line as the spec in `directory` names it: relative to the spec, unless it is absolute."""
    if path.startswith(("/", "~")) or directory.resolve() == Path.cwd():
        return path
    found = os.path.relpath(Path(path).absolute(), directory.resolve())
    return found if found.startswith("..") else f"./{found}"


def _file_seen_from(directory: Path, value: str) -> str:
    """A name of the catalog as it is; a file as `_seen_from` has it."""
    return _seen_from(directory, value) if value.endswith((".yaml", ".yml")) else value


def _requirement(package: str | None, ci: str | None) -> str:
    """What the CI job installs, as a YAML string: a requirement may hold what YAML would read otherwise.

    There is no default: on a public index, the bare name can belong to anybody.
    """
    if ci is None and package is not None:
        raise UsageError("--package needs --ci: it sets what the CI job installs", "add `--ci github` or `--ci gitlab`")
    if ci is not None and not (package or "").strip():
        raise UsageError(
            f"--ci {ci} needs --package: the job must know where to install inferctl from",
            f"pass a Git address, a wheel or a folder, as in `--package '{_EXAMPLE}'`",
        )
    return json.dumps((package or "").strip(), ensure_ascii=False)


def _ci_files(ci: str, directory: Path, given: dict[str, Any], force: bool) -> dict[Path, str]:
    """The files of a CI and their text. One that is the user's own by nature is left alone when it is there."""
    from inferctl import spec

    values = {**given, "spec": spec.DEFAULT_FILE}
    parts = {part: _rendered(f"ci/{part}.sh.j2", values).rstrip() for part in _PARTS}
    made = {}
    for path, template in _CI[ci].items():
        file = directory / path
        if file.exists() and path == _GITLAB_ROOT:
            console.note(f"{file} is yours already: add `include: [{{local: {_GITLAB_PART}}}]` to it")
            continue
        if file.exists() and not force:
            raise UsageError(f"{file} is already there", "edit it, or overwrite it with --force")
        made[file] = _rendered(f"ci/{template}", {**values, **parts})
    return made


def _rendered(template: str, values: dict[str, Any]) -> str:
    import jinja2

    from inferctl import assets, document

    text = (assets.root() / "templates" / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["yaml"] = document.quoted
    return environment.from_string(text).render(values)
