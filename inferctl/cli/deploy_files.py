"""Writes the manifests of `inferctl deploy --output`."""

from __future__ import annotations

from pathlib import Path

from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.deploy import layout, manifest
from inferctl.deploy.objects.embed import EmbedRun
from inferctl.deploy.plan import DeploymentPlan


def write(plan: DeploymentPlan, folder: Path, run: EmbedRun | None = None) -> list[str]:
    """Write all files of `plan` to `folder`, or those of `run` only, and return their paths in it.

    Manifests that an earlier run wrote, and that the plan no longer has, are removed: an overlay would include them.
    Raises `UsageError` if the folder cannot be written, or if a file there is not from an earlier run.
    """
    outputs.check_folder(folder, "--output")
    files = layout.embed_files(plan, run) if run else layout.files(plan)
    for name in files:
        if (file := folder / name).exists() and not (file.is_file() and _written_before(file)):
            raise UsageError(
                f"{file} is not from `inferctl deploy`, and would be overwritten",
                "name another folder with `--output`, or remove the file",
            )
    for top in ("embed",) if run else layout.FOLDERS:
        for file in sorted((folder / top).rglob("*")):
            if file.relative_to(folder).as_posix() not in files and file.is_file() and _written_before(file):
                file.unlink()
    for name, text in files.items():
        outputs.write(folder / name, text, "--output")
    return list(files)


def _written_before(file: Path) -> bool:
    """Return whether `inferctl deploy` wrote `file`. JSON has no comments, but dashboards have names."""
    starts = {
        ".yaml": [manifest.HEADER],
        ".json": ['{"uid": "inferctl-', '{\n "groups": [\n  {\n   "name": "inferctl.', '{\n "uid": "inferctl-'],
    }
    with file.open("rb") as content:
        return content.read(200).startswith(tuple(start.encode() for start in starts.get(file.suffix, [])))
