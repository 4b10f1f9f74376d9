"""`inferctl deploy --lint`: text, JSON, exit codes, and what it reads."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.manifests import lint
from tests.deploy import plans
from tests.deploy.conftest import write
from tests.manifests.lint import seeded

BAD = (
    "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n"
    "spec:\n  containers:\n  - livenessProbe: {httpGet: {port: web}}\n    name: c\n    image: b:1\n"
)
WARNING = BAD.replace("web", "80") + "  volumes: [{name: tmp}]\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["deploy", *arguments])
    written = capsys.readouterr()
    return code, written.out, written.err


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad pod.yaml"
    file.write_text(BAD)
    return file


def test_an_error_has_its_place_and_exit_code_1(capsys: pytest.CaptureFixture[str], bad: Path) -> None:
    code, out, err = run(capsys, "--lint", str(bad))
    assert code == 1
    assert f"{bad}:7: error [port-name-unknown] Pod/a spec.containers.0.livenessProbe.httpGet.port" in out
    assert "    lesson: Limits, affinities and taints" in out
    assert "    what goes wrong: the Service has no endpoints" in out
    assert "    fix: use the name of a port" in out
    assert "1 error, 0 warnings, 0 notes in 1 objects, for Kubernetes 1.35" in err
    assert "error: 1 of the findings is an error" in err


def test_good_manifests_and_warnings_have_exit_code_0(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "--lint", str(seeded.GOOD))
    assert (code, out) == (0, "")
    assert "0 errors, 0 warnings, 0 notes" in err
    (tmp_path / "w.yaml").write_text(WARNING)
    code, out, _ = run(capsys, "--lint", str(tmp_path))
    assert code == 0 and "warning [empty-dir-unbounded]" in out


def test_json_has_the_findings_also_with_errors(capsys: pytest.CaptureFixture[str], bad: Path) -> None:
    code, out, _ = run(capsys, "--lint", str(bad), "--json", "--kubernetes-version", "1.37")
    document = json.loads(out)
    assert code == 1
    assert (document["kubernetes"], document["objects"], document["errors"]) == ("1.37", 1, 1)
    (finding,) = document["findings"]
    assert finding["rule"] == "port-name-unknown" and finding["line"] == 7
    assert set(finding) == set(lint.LintFinding.__dataclass_fields__)


def test_standard_input_is_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(BAD))
    code, out, _ = run(capsys, "--lint", "-")
    assert code == 1 and out.startswith("stdin:7: error [port-name-unknown]")


def test_standard_input_that_is_not_utf_8_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"kind: \xff\xfe"), encoding="utf-8"))
    code, _, err = run(capsys, "--lint", "-")
    assert code == 2 and "byte 6 is not UTF-8" in err


def test_names_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BAD.replace("name: a\n", 'name: "a\\e[2J\\nall is well"\n'))
    code, out, _ = run(capsys, "--lint", str(file))
    assert code == 1
    assert "Pod/a\\x1b[2J\\nall is well" in out and "\x1b" not in out


def test_kinds_that_are_not_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parent / "public" / "kserve.yaml"
    code, out, err = run(capsys, "--lint", str(file))
    assert (code, out) == (0, "")
    assert "the pods of these objects are not checked: 1 InferenceService, 1 ServingRuntime" in err
    code, out, _ = run(capsys, "--lint", str(file), "--json")
    assert json.loads(out)["unread"] == {"InferenceService": 1, "ServingRuntime": 1}


def test_what_is_left_out_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(WARNING)
    code, out, err = run(capsys, "--lint", str(tmp_path), "--json")
    assert json.loads(out)["left_out"] == [] and "left out" not in err
    (tmp_path / "list.yaml").write_text(
        "apiVersion: v1\nkind: List\nitems: {a: b}\n---\napiVersion: v1\nkind: List\nitems:\n- text\n"
    )
    (tmp_path / "values.yaml").write_text("replicas: 2\n")
    code, out, err = run(capsys, "--lint", str(tmp_path))
    places = [f"{tmp_path}/list.yaml:1", f"{tmp_path}/list.yaml:8", f"{tmp_path}/values.yaml:1"]
    assert code == 0 and "in 1 objects" in err
    assert f"left out, because these are no Kubernetes objects: {', '.join(places)}\n" in err
    code, out, _ = run(capsys, "--lint", str(tmp_path), "--json")
    assert json.loads(out)["left_out"] == places


@pytest.mark.parametrize(
    "template",
    [
        "{{- if .Values.on }}\napiVersion: v1\nkind: Pod\n{{- end }}\n",
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {{ .Release.Name }}\n",
    ],
)
def test_a_template_of_helm_is_an_error_that_names_helm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, template: str
) -> None:
    file, helm = tmp_path / "pod.yaml", "run `helm template CHART | inferctl deploy --lint -`"
    file.write_text(template)
    code, _, err = run(capsys, "--lint", str(file))
    assert code == 2 and "not valid YAML" in err and f"if this is a template of Helm, {helm}" in err
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: a\nversion: 1.0.0\n")
    code, _, err = run(capsys, "--lint", str(tmp_path))
    assert code == 2 and f"{tmp_path} is a chart of Helm" in err and helm in err
    file.write_text("apiVersion: v1\nkind: Pod\nmetadata: [\ntext: 'on {{ $labels.pod }}'\n")
    code, _, err = run(capsys, "--lint", str(file))
    assert code == 2 and "Helm" not in err


@pytest.mark.parametrize("name", ["kustomization.yml", "Kustomization"])
def test_overlays_may_be_in_groups(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    overlay = tmp_path / "overlays" / "prod" / "eu"
    overlay.mkdir(parents=True)
    (overlay / name).write_text("resources: [pod.yaml]\nnamePrefix: eu-\n")
    (overlay / "pod.yaml").write_text(BAD)
    code, out, _ = run(capsys, "--lint", str(tmp_path))
    assert code == 1 and f"{overlay / name}: error [port-name-unknown] Pod/eu-a" in out
    code, out, _ = run(capsys, "--lint", str(overlay))
    assert code == 1 and "Pod/eu-a" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lint"], "name the manifests"),
        (["--lint", "absent.yaml"], "cannot be read"),
        (["--lint", str(seeded.GOOD), "--kubernetes-version", "2.0"], "2.0"),
        (["--lint", str(seeded.GOOD), "--kubernetes-version", "1.99"], "'1.99' is not supported"),
        ([str(seeded.GOOD)], "is read only with --lint or --preview"),
        (["--lint", str(seeded.GOOD), "--explain"], "--lint checks manifests only"),
        (["--lint", str(seeded.GOOD), "--spec", "a.yaml"], "--lint checks manifests only"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and expected in err


def test_a_kustomize_tree_is_built_and_checked_overlay_by_overlay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tree = write(plans.files(), tmp_path / "tree")
    code, out, err = run(capsys, "--lint", str(tree))
    assert (code, out) == (0, "")
    assert "0 errors" in err
    pod = tmp_path / "pod.yaml"
    pod.write_text(BAD)
    # A file next to a tree belongs to each overlay, and its finding is shown once.
    code, out, _ = run(capsys, "--lint", str(tree), str(pod))
    assert code == 1 and out.count("[port-name-unknown]") == 1
