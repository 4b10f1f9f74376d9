"""The lint finds nothing in what `inferctl deploy` writes for each version of Kubernetes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inferctl.deploy import layout
from inferctl.manifests import lint, versions
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.manifests.lint import seeded


@pytest.mark.parametrize("minor", versions.TESTED)
def test_there_are_no_findings_in_our_own_manifests(
    minor: int, build: Callable[[dict[str, str], str], Objects]
) -> None:
    files = layout.files(plans.plan(kubernetes=f"1.{minor}"))
    folders = sorted({name.rpartition("/")[0] for name in files if name.startswith(("overlays/", "bench/"))})
    assert len(folders) == 4
    for folder in folders:
        objects = build(files, folder)
        assert len(objects) > 3
        assert lint.lint(seeded.located(objects), lint.LintContext(minor)) == []
