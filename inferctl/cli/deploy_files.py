"""Writes the manifests of `inferctl deploy --output`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferctl.deploy.plan import Plan


def write(plan: Plan, folder: Path) -> list[str]:
    """Write all files of `plan` to `folder` and return their paths in it.

    Manifests that an earlier run wrote, and that the plan no longer has, are removed: an overlay would include them.
    Raises `UsageError` if the folder cannot be written.
    """
    from inferctl import outputs
    from inferctl.deploy import layout, manifest

    outputs.check_folder(folder, "--output")
    files = layout.files(plan)
    for file in sorted(folder.rglob("*.yaml")):
        ours = file.is_file() and file.read_bytes().startswith(manifest.HEADER.encode())
        if ours and file.relative_to(folder).as_posix() not in files:
            file.unlink()
    for name, text in files.items():
        outputs.write(folder / name, text, "--output")
    return list(files)
