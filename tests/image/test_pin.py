"""Tests the pins of a spec and the edits of its YAML file."""

from __future__ import annotations

import dataclasses

import pytest

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.image import pin

COMMIT = "c" * 40
IMAGE = f"nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:{'d' * 64}"
CHANGES = {pin.MODEL: COMMIT, pin.BASE: IMAGE}
CPU = catalog.base("cpu")


def spec(revision: str | None = None, image: str | None = None, source: str = "org/m") -> Spec:
    model = {"source": source, "revision": revision}
    return Spec.model_validate({"name": "m", "model": model, "image": {"base": "cpu", "base_image": image}})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "# why\nmodel:\n  source: org/m  # the model\n  weights: bake\nimage:\n  base: cpu\n  tag: x\n",
            "# why\nmodel:\n  source: org/m  # the model\n  revision: COMMIT\n  weights: bake\n"
            "image:\n  base: cpu\n  base_image: IMAGE\n  tag: x\n",
        ),
        (
            "model:\n    revision: 'v1'   # tested\n    source: org/m\nserve: {port: 1}",
            "model:\n    revision: COMMIT   # tested\n    source: org/m\nserve: {port: 1}\n"
            "image:\n  base_image: IMAGE\n",
        ),
        (
            "model: {source: org/m}\nimage: {}\n",
            "model: {revision: COMMIT, source: org/m}\nimage: {base_image: IMAGE}\n",
        ),
        ("{model: {source: org/m}}", "{image: {base_image: IMAGE}, model: {revision: COMMIT, source: org/m}}"),
        (
            "model:\n  source: org/m\n  revision:\nimage: # none yet\n",
            "model:\n  source: org/m\n  revision: COMMIT\nimage: {base_image: IMAGE} # none yet\n",
        ),
        (
            "---\r\nmodel:\r\n  source: org/m\r\n...\r\n",
            "---\r\nmodel:\r\n  source: org/m\r\n  revision: COMMIT\r\nimage:\r\n  base_image: IMAGE\r\n...\r\n",
        ),
        (
            "model: {source: org/m, revision: main}\nimage:\n  tag: a\n  base_image: >-\n    r.example.com/x\n",
            None,  # a folded text
        ),
        ("x: &m {source: org/m}\nmodel: *m\n", None),  # the anchored value is used elsewhere too
        ("model: {source: org/m, revision: &r main}\nname: *r\n", None),
        ("? model\n: source: org/m\n", "? model\n: source: org/m\n  revision: COMMIT\nimage:\n  base_image: IMAGE\n"),
    ],
)
def test_an_edit_keeps_comments_order_and_layout(before: str, after: str | None) -> None:
    if after is None:
        with pytest.raises(UsageError, match="in this YAML style"):
            pin.edit(before, CHANGES, "inferctl.yaml")
        return
    edited = pin.edit(before, CHANGES, "inferctl.yaml")
    assert edited == after.replace("COMMIT", COMMIT).replace("IMAGE", IMAGE)


@pytest.mark.parametrize("commit", ["1" * 40, "0123456789" * 4, "1234567e" + "1" * 32])
def test_a_commit_that_yaml_would_read_as_a_number_is_quoted(commit: str) -> None:
    edited = pin.edit("model: {source: org/m}\n", {pin.MODEL: commit}, "inferctl.yaml")
    assert settings.parse(edited).data["model"]["revision"] == commit


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "c" * 39])
def test_a_revision_that_is_not_a_commit_is_unpinned(revision: str | None) -> None:
    model, _ = pin.pins(spec(revision), CPU)
    assert (model.path, model.pinned, model.tracked) == (pin.MODEL, False, revision)


def test_a_commit_is_pinned_and_a_folder_needs_no_pin() -> None:
    assert pin.pins(spec(COMMIT), CPU)[0].pinned
    assert [one.path for one in pin.pins(spec(source="./folder"), CPU)] == [pin.BASE]


@pytest.mark.parametrize(
    ("image", "follows", "pinned"),
    [
        (None, "python:3.11-slim-trixie", False),
        ("r.example.com:5000/python", "r.example.com:5000/python", False),
        ("r.example.com:5000/python:3", "r.example.com:5000/python:3", False),
        (f"r.example.com/python:3@sha256:{'1' * 64}", "r.example.com/python:3", True),
        (f"r.example.com/python@sha256:{'1' * 64}", None, True),  # no tag
    ],
)
def test_an_image_is_pinned_by_its_digest(image: str | None, follows: str | None, pinned: bool) -> None:
    base = pin.pins(spec(image=image), CPU)[-1]
    assert (base.path, base.tracked, base.pinned) == (pin.BASE, follows, pinned)


def test_a_base_with_a_digest_in_the_catalog_is_pinned() -> None:
    known = dataclasses.replace(CPU, digest=f"sha256:{'2' * 64}")
    base = pin.pins(spec(), known)[-1]
    assert (base.pinned, base.tracked) == (True, "python:3.11-slim-trixie")
