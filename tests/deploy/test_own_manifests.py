"""The lint finds nothing in the manifests that `inferctl deploy` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.deploy import layout
from inferctl.manifests import manifests_file, versions
from inferctl.manifests.lint import lint
from tests.deploy import plans
from tests.deploy.conftest import kustomize, write
from tests.deploy.test_example import SPECS

CPU = {**plans.FLAVORS[1], "hardware": "cpu", "name": "cpu", "tokens_per_second": 5000}
ONE_EACH = [{**flavor, "min_replicas": 2, "max_replicas": 2} for flavor in plans.FLAVORS]


def findings(folder: Path, minor: int) -> list[str]:
    text = kustomize(folder)
    found = lint(manifests_file.parse(text, folder.name), minor)
    return [f"{each.rule} {each.object} {each.field}: {each.what}" for each in found]


@pytest.mark.parametrize("minor", versions.TESTED)
def test_the_lint_finds_nothing_in_any_version(minor: int, tmp_path: Path) -> None:
    write(layout.files(plans.plan(kubernetes=f"1.{minor}")), tmp_path)
    folders = [folder for part in ("overlays", "bench") for folder in (tmp_path / part).iterdir()]
    assert len(folders) == 4
    assert {folder.name: findings(folder, minor) for folder in folders} == {folder.name: [] for folder in folders}


def test_the_lint_finds_nothing_in_the_example(tmp_path: Path) -> None:
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path)]) == 0
    folders = [folder for part in ("overlays", "bench") for folder in sorted((tmp_path / part).iterdir())]
    assert len(folders) == 4
    assert {str(folder): findings(folder, 35) for folder in folders} == {str(folder): [] for folder in folders}


@pytest.mark.parametrize(
    "deploy",
    [
        {"scaling": "none", "flavors": ONE_EACH},
        {"flavors": [{**plans.FLAVORS[1], "shared_by": 4}]},
        {"flavors": [CPU, *plans.FLAVORS]},
        {"flavors": [{**plans.FLAVORS[1], "min_replicas": 1, "max_replicas": 1}], "overflow": 0},
    ],
    ids=["fixed", "time-slicing", "cpu-first", "one-replica"],
)
def test_the_lint_finds_nothing_in_any_option(deploy: dict[str, Any], tmp_path: Path) -> None:
    files = layout.files(plans.plan(plans.embed(**deploy), kubernetes="1.35"))
    write(files, tmp_path)
    overlays = sorted((tmp_path / "overlays").iterdir())
    assert {folder.name: findings(folder, 35) for folder in overlays} == {folder.name: [] for folder in overlays}


def test_the_lint_finds_nothing_with_slices_of_the_strategy_single(tmp_path: Path) -> None:
    """With MIG's strategy `single`, slices have the resource name of whole GPUs, and another product."""
    clusters = [{**plans.ONE_CLUSTER[0], "mig_strategy": "single"}]
    write(layout.files(plans.plan(clusters=clusters, kubernetes="1.35")), tmp_path)
    assert findings(tmp_path / "overlays" / "aws-us-east-1", 35) == []


def test_a_cluster_without_hardware_for_a_model_has_none_of_its_objects(tmp_path: Path) -> None:
    clusters = [
        {**plans.CLUSTERS[0], "share": 0.5},
        {**plans.CLUSTERS[2], "share": 0.5, "max_replicas": {"l4": 0}},
    ]
    write(layout.files(plans.plan(plans.embed(), plans.generate(), clusters=clusters)), tmp_path)
    folders = [tmp_path / "overlays" / each["name"] for each in clusters]
    assert {folder.name: findings(folder, 35) for folder in folders} == {folder.name: [] for folder in folders}
    here, there = (kustomize(folder).count("app.kubernetes.io/name: chat") for folder in folders)
    assert here > 10
    assert there == 0
