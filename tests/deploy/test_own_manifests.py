"""The lint finds nothing in what `inferctl deploy` writes with other settings than those of test_layout.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferctl.deploy import layout
from tests.deploy import plans
from tests.deploy.conftest import objects
from tests.deploy.test_layout import OVERLAYS, Build
from tests.deploy.validation import lint_findings

CPU = {**plans.FLAVORS[1], "hardware": "cpu", "name": "cpu", "tokens_per_second": 5000}
ONE_EACH = [{**flavor, "min_replicas": 2, "max_replicas": 2} for flavor in plans.FLAVORS]


def findings(folder: Path, minor: int) -> list[str]:
    """Return what the lint finds in the objects that kustomize builds from `folder`."""
    return lint_findings(objects(folder), f"1.{minor}")


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
def test_the_lint_finds_nothing_in_any_option(deploy: dict[str, Any], build: Build) -> None:
    files = layout.files(plans.plan(plans.embed(**deploy), kubernetes="1.35"))
    for overlay in OVERLAYS:
        assert lint_findings(build(files, overlay), "1.35") == []


def test_the_lint_finds_nothing_with_slices_of_the_strategy_single(build: Build) -> None:
    """With MIG's strategy `single`, slices have the resource name of whole GPUs, and another product."""
    clusters = [{**plans.ONE_CLUSTER[0], "mig_strategy": "single"}]
    files = layout.files(plans.plan(clusters=clusters, kubernetes="1.35"))
    assert lint_findings(build(files, OVERLAYS[0]), "1.35") == []


def test_a_cluster_without_hardware_for_a_model_has_none_of_its_objects(build: Build) -> None:
    clusters = [
        {**plans.CLUSTERS[0], "share": 0.5},
        {**plans.CLUSTERS[2], "share": 0.5, "max_replicas": {"l4": 0}},
    ]
    files = layout.files(plans.plan(plans.embed(), plans.generate(), clusters=clusters))
    here, there = (build(files, f"overlays/{each['name']}") for each in clusters)
    assert lint_findings(here, "1.35") == lint_findings(there, "1.35") == []
    assert repr(here).count("'app.kubernetes.io/name': 'chat'") > 10
    assert "'chat'" not in repr(there)
