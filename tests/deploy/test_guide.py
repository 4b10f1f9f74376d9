"""The guide to Kubernetes: its commands, links and figures are those of the program and of the example."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from inferctl import cli
from inferctl.deploy.objects import policy
from tests.conftest import ROOT
from tests.deploy.conftest import objects
from tests.deploy.validation import VERSIONS, problems
from tests.processes import execute, python

GUIDE = ROOT / "docs/guides/kubernetes.md"
EXAMPLE = ROOT / "docs/examples/kubernetes"
TEXT = GUIDE.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Return the command lines of a program in the guide, without what follows in a pipe or a redirection."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||>", line)]
    return [shlex.split(part) for part in parts if part.startswith(f"{program} ")]


def test_each_option_of_inferctl_exists() -> None:
    found = get_command(cli.app).commands  # type: ignore[attr-defined]  # the root is a group
    assert len(commands("inferctl")) >= 8
    for _, *words in commands("inferctl"):
        command = found[words.pop(0)]
        if inner := getattr(command, "commands", None):
            command = inner[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_the_commands_of_deploy_run_and_overlays_are_where_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    example = shutil.copytree(EXAMPLE, tmp_path / "example", copy_function=shutil.copyfile)
    kubectl = Path(sys.executable).with_name("kubectl")
    wanted = [words for words in commands("inferctl") if words[1] == "deploy" and "--preview" not in words]
    for words in wanted:
        if "--lint" in words:
            done = execute(kubectl, "kustomize", "manifests/overlays/aws-eu-central-1", cwd=example, code=0)
            (example / "all.yaml").write_text(done.stdout)
        python("-m", *words, cwd=example, code=0)
    words = {word for program in ("kubectl", "helm") for words in commands(program) for word in words}
    paths = {word for word in words if word.startswith(("manifests/", "cluster/"))}
    assert {path.split("/")[1] for path in paths} >= {"base", "bench", "overlays", "weights.yaml"}
    assert {path for path in paths if not (example / path).exists()} == set()
    jobs = {job for each in words for job in re.findall(r"^job/(\S+)", each)}
    bench = (example / "manifests/bench/aws-eu-central-1/embed.yaml").read_text()
    assert jobs and all(f"name: {job}\n" in bench for job in jobs)
    built = [each for each in yaml.safe_load_all((example / "all.yaml").read_text()) if each]
    names = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in built}
    named = set(re.findall(r"\b(?:deployment|statefulset|service)/[\w-]+", TEXT))
    assert named
    assert named <= names
    page = (ROOT / "docs/deploy.md").read_text()
    assert f"(priority {policy.overflow_priority()['value'].value})" in (ROOT / "docs/deploy-preview.md").read_text()
    crds = {each["kind"] for each in built if re.search(r"(keda|coreos|x-k8s)\b", each["apiVersion"])}
    assert crds >= {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
    assert {kind for kind in crds if kind not in page} == set()
    secrets = set(re.findall(r"create secret generic ([\w-]+)", TEXT))
    text = (example / "all.yaml").read_text()
    assert secrets == {"inferctl-keys", "inferctl-ledger", "inferctl-nats"}
    assert all(secret in text for secret in secrets)


def test_what_the_specs_name_outside_of_the_manifests_is_made_in_the_guide() -> None:
    specs = [yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text()) for name in ("embed", "generate")]
    (secret,) = (words for words in commands("kubectl") if specs[0]["deploy"]["broker_secret"] in words)
    (url,) = (word.partition("url=")[2] for word in secret if word.startswith("--from-literal"))
    assert url.replace("$TOKEN@", "") == specs[0]["access"]["broker"] == specs[1]["access"]["broker"]
    weights = list(yaml.safe_load_all((EXAMPLE / "cluster/weights.yaml").read_text()))
    claim = specs[1]["deploy"]["weights"]["pvc"]
    assert (weights[0]["kind"], weights[0]["metadata"]["name"]) == ("PersistentVolumeClaim", claim)
    # Pods of several nodes mount it.
    assert weights[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {each["metadata"]["namespace"] for each in weights} == {specs[1]["deploy"]["namespace"]}
    assert [problem for each in weights for problem in problems(each, "1.35")] == []


def test_the_example_is_quoted_as_it_is() -> None:
    (quoted,) = (yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml")
    spec = yaml.safe_load((EXAMPLE / "embed.yaml").read_text())["deploy"]
    assert quoted["deploy"]["traffic"] == spec["traffic"]
    for mine, theirs in zip(quoted["deploy"]["flavors"], spec["flavors"], strict=True):
        assert mine["hardware"] == theirs["hardware"]
        assert {key: mine[key] for key in mine if key != "image"} == {
            key: theirs[key] for key in mine if key != "image"
        }


def test_the_smallest_deployment_comes_first_and_is_as_small_as_it_says(tmp_path: Path) -> None:
    assert cli.run(["deploy", "-f", str(EXAMPLE / "one.yaml"), "--output", str(tmp_path)]) == 0
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert TEXT.index("one.yaml") < TEXT.index("embed.yaml")
    page = (ROOT / "docs/deploy.md").read_text()
    assert re.findall(r"(\d+) files", page.partition("embed.yaml")[0]) == [str(len(files))]
    built = objects(tmp_path / "overlays" / "default")
    assert [problem for version in VERSIONS for each in built for problem in problems(each, version)] == []
    assert cli.run(["deploy", "--lint", str(tmp_path)]) == 0
    (route,) = yaml.safe_load_all((EXAMPLE / "cluster/route.yaml").read_text())
    assert (route["apiVersion"], route["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    (service,) = (each for each in built if each["kind"] == "Service")
    assert (service["metadata"]["name"], service["metadata"]["namespace"]) == (backend["name"], "inference")
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    # Servers trust this header of proxies.
    assert route["spec"]["rules"][0]["filters"] == [
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": ["x-inferctl-key-id"]}}
    ]
