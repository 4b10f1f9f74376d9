"""A build says whether the image that it replaces has another vector space, or computes it in another way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inferctl.image import replaced

ONE, SECOND = {"io.inferctl.model.space": "dense_1"}, {"io.inferctl.model.space": "dense_2"}
STACK = {"io.inferctl.stack": "torch2.12-cpu"}


def several(**spaces: str) -> dict[str, str]:
    return {"io.inferctl.names": json.dumps([{"name": name, "space": space} for name, space in spaces.items()])}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({}, ONE, []),  # no image, or one of an earlier version
        (ONE, ONE, []),
        (ONE, SECOND, ["dense_1 to dense_2"]),
        (ONE | STACK, ONE | {"io.inferctl.stack": "torch2.13-cpu"}, ["torch2.12-cpu -> torch2.13-cpu"]),
        (ONE | STACK, SECOND | {"io.inferctl.stack": "torch2.13-cpu"}, ["dense_1 to dense_2"]),
        (STACK, {"io.inferctl.stack": "torch2.13-cpu"}, []),  # no vectors
        (several(a="dense_1", b="dense_1"), several(a="dense_1", b="dense_2", c="dense_3"), ["b: the vector space"]),
        ({"io.inferctl.names": "[1"}, ONE, []),
    ],
)
def test_what_changes(old: Any, new: Any, said: list[str]) -> None:
    found = replaced.compare(old, new, "inferctl space diff")
    assert len(found) == len(said)
    assert all(("--served-model b" in (each.hint or "")) == each.what.startswith("b: ") for each in found)
    assert all(part in each.what for part, each in zip(said, found, strict=True))
