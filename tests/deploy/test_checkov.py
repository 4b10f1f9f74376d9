"""checkov as a second opinion on the manifests: no finding, except those that have a reason here."""

from __future__ import annotations

import json
import shutil
import venv
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from tests.deploy.conftest import kustomize
from tests.deploy.test_example import SPECS
from tests.packages import install
from tests.processes import execute
from tests.required import requires

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
VERSION = "3.3.30"
# Check -> (ends of the names of objects that may fail it, why).
WAIVED: dict[str, tuple[tuple[str, ...], str]] = {
    "CKV_K8S_8": (
        ("-overflow",),
        "a placeholder does nothing that could hang",
    ),
    "CKV_K8S_9": (("-overflow",), "nobody sends requests to it, so readiness has no meaning"),
    "CKV_K8S_15": (
        ("-overflow", "-gateway"),
        "tags of releases, which do not move: a node may keep them",
    ),
    "CKV_K8S_35": (
        ("-a100-half", "-l4", "-t4"),
        "the relay reads URLs of the ledger and of NATS from variables",
    ),
    "CKV_K8S_43": (
        ("-overflow", "-gateway"),
        "images of other projects by their release: a digest would be for one platform, and mirrors change it",
    ),
}


@pytest.fixture(scope="module")
def checkov(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `checkov`. In CI, in an environment of its own: 290 MB, with older packages than inferctl has."""
    if found := shutil.which("checkov"):
        return Path(found)
    if not requires("checkov"):
        pytest.skip("checkov is not installed; INFERCTL_REQUIRE=checkov installs it for the test")
    folder = tmp_path_factory.mktemp("checkov")
    venv.create(folder)
    install(folder / "bin" / "python", f"checkov=={VERSION}")
    return folder / "bin" / "checkov"


def test_checkov_finds_nothing_that_has_no_reason(checkov: Path, tmp_path: Path) -> None:
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path / "example")]) == 0
    folders = (tmp_path / "example" / "overlays").iterdir()
    built = [kustomize(folder) for folder in folders if (folder / "kustomization.yaml").exists()]
    assert len(built) == 3
    file = tmp_path / "all.yaml"
    file.write_text("---\n".join(built))
    command = [checkov, "-f", file, "--framework", "kubernetes", "--output", "json", "--compact", "--quiet"]
    done = execute(*command, "--skip-download")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["summary"]["parsing_errors"] == 0
    assert found["summary"]["passed"] > 1000
    failed = {(check["check_id"], check["resource"]) for check in found["results"]["failed_checks"]}
    explained = {
        (check, resource) for check, resource in failed if check in WAIVED and resource.endswith(WAIVED[check][0])
    }
    assert failed - explained == set()
    assert {check for check, _ in explained} == set(WAIVED), "a reason that nothing needs"
