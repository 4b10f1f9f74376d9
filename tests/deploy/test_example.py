"""The example of the documentation: two models, two clouds, three regions. All of its manifests are valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.deploy import manifest
from tests.deploy.conftest import ROOT, objects
from tests.deploy.validation import VERSIONS, problems

EXAMPLE = ROOT / "docs" / "examples" / "kubernetes"
SPECS = ["-f", str(EXAMPLE / "embed.yaml"), "-f", str(EXAMPLE / "generate.yaml")]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_of_the_example_is_valid(version: str, tmp_path: Path) -> None:
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path), "--kubernetes-version", version]) == 0
    overlays = sorted((tmp_path / "overlays").iterdir())
    assert [folder.name for folder in overlays] == ["aws-eu-central-1", "aws-us-east-1", "gcp-europe-west4"]
    built = {json.dumps(each, sort_keys=True): each for folder in overlays for each in objects(folder)}
    kinds = {each["kind"] for each in built.values()}
    assert kinds >= {"Deployment", "ScaledObject", "ServiceMonitor", "NodePool", "ResourceQuota"}
    # Slices on Karpenter have no overflow, so that of GKE is the only buffer, from 1.35.
    assert ("CapacityBuffer" in kinds) == (version >= "1.35")
    assert [problem for each in built.values() for problem in problems(each, version)] == []


def test_output_replaces_what_an_earlier_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale, foreign = tmp_path / "overlays" / "gone" / "quota.yaml", tmp_path / "overlays" / "mine.yaml"
    stale.parent.mkdir(parents=True)
    stale.write_text(f"{manifest.HEADER}kind: ResourceQuota\n")
    foreign.write_text("kind: ResourceQuota\n")
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["output"] == str(tmp_path)
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {*document["files"], "overlays/mine.yaml"}


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert cli.run(["deploy", *SPECS, "--output", str(file)]) == 2
    assert "cannot be written" in capsys.readouterr().err
