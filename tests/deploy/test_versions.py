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


# The versions in which a field works by default, from the table of feature gates of Kubernetes 1.36 and 1.37.
WORKS = {
    "image-volume": (35, 36, 37),
    "dra": (34, 35, 36, 37),
    "dra-first-available": (34, 35, 36, 37),
    "dra-extended-resource": (36, 37),
    "dra-device-taints": (37,),
    "hpa-tolerance": (35, 36, 37),
    "hpa-scale-to-zero": (37,),
    "prefer-same-zone": (34, 35, 36, 37),
    "pre-stop-sleep": (32, 33, 34, 35, 36, 37),
    "in-place-resize": (33, 34, 35, 36, 37),
}


@pytest.mark.parametrize("feature", WORKS)
def test_a_field_works_in_the_versions_that_switch_it_on(feature: str) -> None:
    assert tuple(v for v in versions.TESTED if versions.works(feature, f"1.{v}")) == WORKS[feature]


def test_each_field_is_tested_and_works_in_later_versions() -> None:
    assert versions.FEATURES.keys() == WORKS.keys()
    assert all(versions.works(feature, "1.40") for feature in versions.FEATURES)
