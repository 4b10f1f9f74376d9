"""The example of the documentation: two models, two clouds, three regions. All of its manifests are valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl import cli
from inferctl.deploy import manifest
from tests.deploy.conftest import ROOT, objects
from tests.deploy.validation import VERSIONS, lint_findings, problems

EXAMPLE = ROOT / "docs" / "examples" / "kubernetes"
MODELS, FLAVORS = ("embed", "generate"), ("a100-half", "l4", "t4")
SPECS = ["-f", str(EXAMPLE / "embed.yaml"), "-f", str(EXAMPLE / "generate.yaml")]


@pytest.mark.parametrize("version", [VERSIONS[0], "1.35", VERSIONS[-1]])  # test_layout.py has all versions
def test_every_manifest_of_the_example_is_valid_and_the_lint_finds_nothing(version: str, tmp_path: Path) -> None:
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path), "--kubernetes-version", version]) == 0
    folders = [*sorted((tmp_path / "overlays").iterdir()), *(tmp_path / "bench").iterdir()]
    assert [each.name for each in folders[:-1]] == ["aws-eu-central-1", "aws-us-east-1", "gcp-europe-west4"]
    built = {}
    for folder in folders:
        found = objects(folder)
        assert lint_findings(found, version) == []
        built |= {json.dumps(each, sort_keys=True): each for each in found}
    kinds = {each["kind"] for each in built.values()}
    assert kinds >= {"Deployment", "ScaledObject", "ServiceMonitor", "PriorityClass", "ResourceQuota"}
    assert [problem for each in built.values() for problem in problems(each, version)] == []


def test_the_example_has_everything_once(tmp_path: Path) -> None:
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path)]) == 0
    texts = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    expressions, jobs = [], []
    for text in texts:
        loaded = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]  # JSON is YAML
        rules = [rule for each in loaded for group in each.get("spec", {}).get("groups", ()) for rule in group["rules"]]
        queries = [query for each in loaded for panel in each.get("panels", ()) for query in panel.get("targets", ())]
        expressions += {each["expr"] for each in (*rules, *queries)}
        jobs += [each["metadata"]["name"] for each in loaded if each.get("kind") == "Job"]
    assert len(expressions) == len(set(expressions)) > 50
    assert sorted(jobs) == sorted(f"bench-{model}-{flavor}" for model in MODELS for flavor in FLAVORS)


def test_output_overwrites_no_file_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "base" / "kustomization.yaml"
    mine.parent.mkdir()
    mine.write_text("resources: [mine.yaml]\n")
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path)]) == 2
    assert "is not from `inferctl deploy`" in capsys.readouterr().err
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [mine]
    assert mine.read_text() == "resources: [mine.yaml]\n"


def test_errors_of_several_specs_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_with(text: str) -> str:
        (tmp_path / "b.yaml").write_text(text)
        assert cli.run(["deploy", *SPECS[:2], "-f", str(tmp_path / "b.yaml"), "--explain"]) == 2
        return "".join(capsys.readouterr().err.split())

    model = "{source: org/x, task: embed, weights: bake}"
    spec = f"{{name: NAME, model: {model}, deploy: {{namespace: inference, flavors: [{{hardware: l5}}]}}}}"
    assert f"{tmp_path}/b.yaml:deploy.flavors[0]:hardware'l5'notfound" in error_with(spec.replace("NAME", "b"))
    text = spec.replace("NAME", "embed").replace("hardware: l5", "hardware: l4, min_replicas: 1, max_replicas: 1")
    assert f"twospecshavethenameembed({EXAMPLE}/embed.yaml,{tmp_path}/b.yaml)" in error_with(text)


def test_output_replaces_what_an_earlier_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale, foreign = tmp_path / "overlays" / "gone" / "quota.yaml", tmp_path / "overlays" / "mine.yaml"
    stale.parent.mkdir(parents=True)
    stale.write_text(f"{manifest.HEADER}kind: ResourceQuota\n")
    foreign.write_text("kind: ResourceQuota\n")
    assert cli.run(["deploy", *SPECS, "--output", str(tmp_path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["output"] == str(tmp_path)
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {*document["files"], "overlays/mine.yaml"}
