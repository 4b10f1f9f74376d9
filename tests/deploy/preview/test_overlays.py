"""Tests for the manifests of a preview: plain files, and overlays that the real kubectl builds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inferctl.deploy.preview import overlays
from inferctl.errors import InferctlError, NotReadyError, UsageError

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: embed}
spec:
  replicas: 1
  selector: {matchLabels: {app: embed}}
  template:
    metadata: {labels: {app: embed}}
    spec: {containers: [{name: main, image: server}]}
"""
PATCH = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: embed}\nspec: {replicas: 5}\n"


def tree(folder: Path, *names: str) -> Path:
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "embed.yaml").write_text(DEPLOYMENT)
    (folder / "base" / "kustomization.yaml").write_text("resources: [embed.yaml]\n")
    for index, name in enumerate(names):
        overlay = folder / "overlays" / name
        overlay.mkdir(parents=True)
        patches = "patches: [{path: patch.yaml}]\n" if index == 0 else ""
        (overlay / "kustomization.yaml").write_text(f"resources: [../../base]\n{patches}")
        if index == 0:
            (overlay / "patch.yaml").write_text(PATCH)
    return folder


def test_each_cluster_gets_its_overlay(tmp_path: Path) -> None:
    found = overlays.read([tree(tmp_path, "one", "two")], ["one", "two"])
    assert {name: [each.data["spec"]["replicas"] for each in objects] for name, objects in found.items()} == {
        "one": [5],
        "two": [1],
    }


def test_a_single_overlay_needs_no_name(tmp_path: Path) -> None:
    (objects,) = overlays.read([tree(tmp_path, "one")], ["cluster"]).values()
    assert [each.data["spec"]["replicas"] for each in objects] == [5]


def test_a_cluster_without_an_overlay_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'three'") as caught:
        overlays.read([tree(tmp_path, "one", "two")], ["one", "three"])
    assert "one, two" in str(caught.value.hint)


def test_one_kustomization_is_built(tmp_path: Path) -> None:
    found = overlays.read([tree(tmp_path, "one") / "overlays" / "one"], ["a", "b"])
    assert [each.data["spec"]["replicas"] for objects in found.values() for each in objects] == [5, 5]


def test_a_kustomization_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    with pytest.raises(InferctlError, match=r"absent\.yaml"):
        overlays.read([tmp_path], ["one"])


def test_without_kubectl_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NotReadyError, match="kubectl"):
        overlays.read([tree(tmp_path / "tree", "one")], ["one"])


def test_plain_files_are_the_same_in_every_cluster(tmp_path: Path) -> None:
    file = tmp_path / "embed.yaml"
    file.write_text(DEPLOYMENT)
    found = overlays.read([file], ["one", "two"])
    assert [[each.name for each in objects] for objects in found.values()] == [["embed"], ["embed"]]
