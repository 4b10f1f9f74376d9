"""Tests for the manifests of a preview: plain files, and overlays that the real kubectl builds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.manifests import manifests_file
from inferctl.manifests.preview import overlays

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


@pytest.mark.parametrize(
    ("names", "clusters", "replicas"),
    [(("one", "two"), ["one", "two"], [[5], [1]]), (("one",), ["cluster"], [[5]])],  # a single one needs no name
)
def test_each_cluster_gets_its_overlay(
    names: tuple[str, ...], clusters: list[str], replicas: list[list[int]], tmp_path: Path
) -> None:
    found = overlays.read([tree(tmp_path, *names)], clusters)
    assert list(found) == clusters
    assert [[each.data["spec"]["replicas"] for each in objects] for objects in found.values()] == replicas


def test_a_cluster_without_an_overlay_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'three'") as caught:
        overlays.read([tree(tmp_path, "one", "two")], ["one", "three"])
    assert "one, two" in str(caught.value.hint)


def test_one_kustomization_is_built(tmp_path: Path) -> None:
    found = overlays.read([tree(tmp_path, "one") / "overlays" / "one"], ["a", "b"])
    assert [each.data["spec"]["replicas"] for objects in found.values() for each in objects] == [5, 5]


def test_a_kustomization_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        overlays.read([tmp_path], ["one"])


@pytest.mark.parametrize("name", manifests_file.KUSTOMIZATIONS)
def test_the_file_of_a_kustomization_is_built(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree(tmp_path, "one") / "overlays" / "one"
    file = (folder / "kustomization.yaml").rename(folder / name)
    (objects,) = overlays.read([file], ["cluster"]).values()
    assert [each.data["spec"]["replicas"] for each in objects] == [5]
    assert cli.run(["deploy", "--lint", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objects"] == 1


PANIC = """# Warning: 'commonLabels' is deprecated.
panic: runtime error: invalid memory address or nil pointer dereference
[signal SIGSEGV: segmentation violation code=0x1 addr=0x40 pc=0x15c3d25]

goroutine 1 [running]:
main.main()
\tk8s.io/kubernetes/cmd/kubectl/kubectl.go:30 +0x18
"""


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (f"cat >&2 <<'X'\n{PANIC}X\nexit 2", 3, "panic: runtime error"),
        ("echo 'fatal error: runtime: out of memory' >&2; exit 2", 3, "out of memory"),
        ("kill -SEGV $$", 3, "signal 11"),
        ("exit 7", 3, "exit code 7"),
        ("printf '# Warning: old\\nerror: no such file: x.yaml\\n' >&2; exit 1", 2, "no such file: x.yaml"),
        ("printf '\\n\\nError: unknown command \"kustomize\"\\nRun --help\\n' >&2; exit 1", 2, "unknown command"),
        ("printf '\\377' >&2; exit 1", 2, "\N{REPLACEMENT CHARACTER}"),
        ("printf 'kind: \\377'", 2, "apiVersion"),
        ("echo 'not: an object'", 2, "no apiVersion"),
    ],
)
def test_a_failure_of_kubectl_is_never_a_finding(
    script: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    folder = str(tree(tmp_path / "tree", "cluster"))
    assert cli.run(["deploy", "--lint", folder]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "goroutine" not in error and "kubectl.go" not in error and "Warning" not in error


@pytest.mark.parametrize("program", [b"\x7fELF of another machine", None])
def test_a_kubectl_that_is_absent_or_cannot_run(
    program: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if program:
        (tmp_path / "kubectl").write_bytes(program)
        (tmp_path / "kubectl").chmod(0o755)
    with pytest.raises(NotReadyError, match="kubectl"):
        overlays.read([tree(tmp_path / "tree", "one")], ["one"])


def test_plain_files_are_the_same_in_every_cluster(tmp_path: Path) -> None:
    file = tmp_path / "embed.yaml"
    file.write_text(DEPLOYMENT)
    found = overlays.read([file], ["one", "two"])
    assert [[each.name for each in objects] for objects in found.values()] == [["embed"], ["embed"]]
