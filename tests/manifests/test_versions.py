"""The table of fields by version of Kubernetes."""

from __future__ import annotations

import pytest

from inferctl.core.errors import UsageError
from inferctl.manifests import versions


@pytest.mark.parametrize(
    ("text", "minor"), [("1.35", 35), ("v1.34.2", 34), ("1.35.2-gke.1842000", 35), ("1.37+", 37), ("1.32.0+k3s1", 32)]
)
def test_versions_are_read_as_clouds_write_them(text: str, minor: int) -> None:
    assert versions.minor_of(text) == minor


@pytest.mark.parametrize("text", ["", "1", "2.1", "1.x", "1.35 ", "35"])
def test_other_texts_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="is not a version of Kubernetes"):
        versions.minor_of(text)
