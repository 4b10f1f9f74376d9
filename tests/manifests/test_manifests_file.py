"""Reading Kubernetes objects: documents, lists, folders, lines, and files that are too large or broken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from inferctl.core import document
from inferctl.core.errors import SpecError, UsageError
from inferctl.manifests import manifests_file

POD = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n"


def test_documents_keep_their_lines() -> None:
    text = f"# comment\n{POD.format(name='a')}---\n---\n{POD.format(name='b')}spec:\n  containers:\n  - name: c\n"
    first, second = manifests_file.parse(text, "f.yaml")
    assert (first.kind, first.name, first.line(), first.line(("metadata", "name"))) == ("Pod", "a", 2, 5)
    assert (second.name, second.line(), second.line(("spec", "containers", 0, "name"))) == ("b", 8, 14)
    # A field that is absent has the line of its closest parent.
    assert second.line(("spec", "containers", 0, "image")) == 14
    assert second.line(("status", "phase")) == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("0400", 256), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("yes", True), ("1e3", 1000.0), ("0x10", 16)],
)
def test_scalars_are_read_as_kubectl_reads_them(text: str, value: object) -> None:
    (item,) = manifests_file.parse(POD.format(name="a") + f"x: {{1: {text}}}\n", "f.yaml")
    assert item.data["x"] == {"1": value}


def test_lists_are_replaced_by_their_items() -> None:
    text = (
        "apiVersion: v1\nkind: List\nitems:\n"
        "- apiVersion: v1\n  kind: Node\n  metadata:\n    name: a\n- apiVersion: v1\n  kind: Pod\n"
    )
    node, pod = manifests_file.parse(text, "f.yaml")
    assert (node.kind, node.name, node.line(("metadata", "name"))) == ("Node", "a", 7)
    assert (pod.kind, pod.name, pod.line()) == ("Pod", "", 8)


def test_items_of_a_typed_list_get_its_kind() -> None:
    data = {"apiVersion": "v1", "kind": "NodeList", "items": [{"metadata": {"name": "a", "namespace": "n"}}]}
    (node,) = manifests_file.parse(json.dumps(data), "f.json")
    assert (node.kind, node.api_version, node.namespace) == ("Node", "v1", "n")


def test_folders_leave_out_what_is_not_an_object(tmp_path: Path) -> None:
    write = {
        "a/deployment.yaml": POD.format(name="a"),
        "a/kustomization.yaml": "resources: [deployment.yaml]\npatches:\n- path: patch.yaml\n- patch: |-\n    a: b\n",
        "a/patch.yaml": POD.format(name="patched"),
        "component.yaml": "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\n",
        "values.yaml": "replicas: 2\n",
        "chart/templates/t.yaml": "{{- if .Values.x }}\napiVersion: v1\nkind: Pod\n{{ end }}\n",
        "b.json": json.dumps({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}}),
        "notes.txt": "no YAML",
    }
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [each.name for each in manifests_file.read([tmp_path])] == ["a", "b"]
    left_out: list[str] = []
    assert manifests_file.read([tmp_path], left_out)[0].file == str(tmp_path / "a" / "deployment.yaml")
    assert left_out == [str(tmp_path / "chart" / "templates" / "t.yaml"), f"{tmp_path / 'values.yaml'}:1"]


def test_what_others_write_is_read() -> None:
    """A bare =, as in the resources of Prometheus, an emoji as two escapes, and an integer that Python cannot print."""
    text = POD.format(name="a") + f"operators: [=, '!=', =~]\nlarge: 0x{'f' * 5000}\nmore: {2**70}\n"
    (item,) = manifests_file.parse(text, "f.yaml")
    assert item.data["operators"] == ["=", "!=", "=~"]
    assert (item.data["large"], item.data["more"]) == (math.inf, float(2**70))
    data = {"apiVersion": "v1", "kind": "Pod", "metadata": {"annotations": {"mood": "\U0001f600", "path": "\\ud83d"}}}
    escaped = json.dumps(data, indent=2)
    assert "\\ud83d\\ude00" in escaped
    (item,) = manifests_file.parse(escaped, "f.json")
    assert item.data == data and item.line(("metadata", "annotations", "path")) == 7


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    file = tmp_path / "windows.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + POD.format(name="a").replace("\n", "\r\n").encode())
    assert [each.name for each in manifests_file.read([file])] == ["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (POD.format(name="a") + "x: !!bool maybe\n", "a tag does not fit its value"),
        (POD.format(name="a") + "x: !!int ''\n", "a tag does not fit its value"),
        (POD.format(name="a") + "x: !!timestamp y\n", "a tag does not fit its value"),
        ("apiVersion: v1\nkind: Pod\n---\n- a\n", "f.yaml:4: expected a Kubernetes object"),
        ("a: 1\n", "f.yaml:1: not a Kubernetes object"),
        (POD.format(name="a") + "kind: Pod\n", "duplicate key kind"),
        ("apiVersion: v1\nkind: [\n", "not valid YAML"),
        ("a: &a [" + "b," * 1000 + "]\n" + "".join(f"c{i}: [" + "*a," * 50 + "]\n" for i in range(30)), "more than"),
        ("[" * 60 + "]" * 60, "nested deeper"),
    ],
    ids=["boolean", "integer", "time", "list", "no kind", "duplicate", "syntax", "aliases", "depth"],
)
def test_broken_text_is_an_error_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        manifests_file.parse(text, "f.yaml")
    assert expected in caught.value.message and caught.value.hint


def test_large_files_missing_files_and_empty_folders_are_errors(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_text("#" * (document.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(UsageError, match="is larger than"):
        manifests_file.read([large])
    with pytest.raises(UsageError, match="cannot be read"):
        manifests_file.read([tmp_path / "absent.yaml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no YAML files"):
        manifests_file.read([tmp_path / "empty"])
