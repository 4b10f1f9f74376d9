"""checkov as a second opinion on the manifests: no finding, except those that have a reason here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

from inferctl.deploy import layout
from tests.deploy import plans
from tests.deploy.conftest import kustomize, write
from tests.deploy.test_layout import OVERLAYS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
VERSION = "3.3.8"
# Check -> (objects that may fail it, by a part of the name; why).
WAIVED: dict[str, tuple[tuple[str, ...], str]] = {}


@pytest.fixture(scope="module")
def checkov(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `checkov` in an environment of its own: it needs 290 MB and pins packages that inferctl has newer."""
    if found := shutil.which("checkov"):
        return Path(found)
    if "checkov" not in os.environ.get("INFERCTL_REQUIRE", "").split(","):
        pytest.skip("checkov is not installed; with INFERCTL_REQUIRE=checkov, the test installs it")
    folder = tmp_path_factory.mktemp("checkov")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"checkov=={VERSION}"], check=True)
    return folder / "bin" / "checkov"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_checkov_finds_nothing_that_has_no_reason(overlay: str, checkov: Path, tmp_path: Path) -> None:
    files = layout.files(plans.plan())
    folder = write(files, tmp_path / "manifests")
    (tmp_path / "all.yaml").write_text(
        kustomize(folder / overlay) + "---\n" + kustomize(folder / overlay.replace("overlays", "bench"))
    )
    command = [checkov, "-f", tmp_path / "all.yaml", "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run([*command, "--compact", "--quiet", "--skip-download"], capture_output=True, text=True)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["summary"]["passed"] > 300
    failed = [
        (check["check_id"], check["resource"], check["check_name"]) for check in found["results"]["failed_checks"]
    ]
    unexplained = [each for each in failed if not any(part in each[1] for part in WAIVED.get(each[0], ((), ""))[0])]
    assert unexplained == []
