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


# From the table of feature gates of Kubernetes 1.36 and 1.37.
SINCE = {
    "pre-stop-sleep": 32,
    "in-place-resize": 33,
    "prefer-same-zone": 34,
    "image-volume": 35,
    "hpa-tolerance": 35,
    "hpa-scale-to-zero": 37,
}


def test_a_field_works_from_its_first_version_on() -> None:
    assert {name: feature.since for name, feature in versions.FEATURES.items()} == SINCE
    for name, since in SINCE.items():
        assert [versions.FEATURES[name].works(minor) for minor in (since - 1, since, 40)] == [False, True, True]
