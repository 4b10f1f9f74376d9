"""`inferctl deploy --explain` and `--json`, against numbers that are worked out by hand in the comments."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl import cli
from inferctl.receipts import receipt
from tests.deploy.arithmetic.sources import HALF, IMAGE, write_receipt

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "kubernetes"

SPEC = f"""\
name: embed
model: {{source: org/embed, task: embed, weights: bake}}
deploy:
  clusters: clusters.yaml
  flavors:
    - {{hardware: {HALF}, name: half, receipt: half.json, image: "{IMAGE}"}}
    - {{hardware: l4, tokens_per_second: 40000, image: "{IMAGE}"}}
  traffic: {{base_rps: 200, peak_rps: 1400, tokens_per_request: 250, rise_s: 200}}
  utilization: 0.8
  cold_start_s: 150
"""
CLUSTERS = """\
clusters:
  - {name: one, share: 0.8, max_replicas: {a100-40gb-mig-3g.20gb: 3}}
  - {name: two, share: 0.2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inferctl.yaml").write_text(SPEC)
    (tmp_path / "clusters.yaml").write_text(CLUSTERS)
    write_receipt(tmp_path / "half.json", HALF, 400.0, resources={"server_peak_bytes": 2**30, "server_cores": 1.1})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.run(["deploy", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def values(figures: list[dict[str, Any]]) -> dict[str, Any]:
    return {figure["name"]: figure["value"] for figure in figures}


@pytest.mark.usefixtures("folder")
def test_every_number_is_the_one_worked_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys)
    (model,) = found["models"]
    # 200 x 250, 1,400 x 250, (350,000 - 50,000) / 200
    assert values(model["traffic"]) == {
        "tokens per request": 250,
        "base traffic": 50_000,
        "peak traffic": 350_000,
        "slope of the rise": 1_500,
    }
    half, l4 = model["flavors"]
    # Measured: 400 requests/s x 250 tokens. Load 41.5 s: 3 x 41.5 / 5 = 24.9 -> 25 probes. Grace 5 + 1 + 25 + 5.
    # Memory 1.25 x 1 GiB. Cores 1.2 x 1.1 = 1.32 -> 2.
    assert (half["rate"]["tokens_per_second"], half["rate"]["measured"]) == (100_000, True)
    assert values(half["figures"]) == {
        "rate, measured": 100_000,
        "load time": 41.5,
        "cold start": 150,
        "failures of the startup probe": 25,
        "drain": 25,
        "grace period": 36,
        "host memory": 1_342_177_280,
        "cores": 2,
    }
    # Cluster one has 80%: base 40,000, peak 280,000. A half is planned with 80,000: base 1, peak 3.5 -> 4, but the
    # cluster has 3. Minimum 2, so one can be added. Overflow: 0.8 x 1,500 x 150 / 100,000 = 1.8 -> 2, but only 1 can,
    # and none is left next to the maximum.
    one, two = half["clusters"]
    assert values(one["figures"]) == {"replicas at base": 1, "replicas at peak": 4, "minimum": 2, "maximum": 3}
    # Cluster two has 20%: peak 70,000 / 80,000 -> 1, but at least 2 replicas run.
    assert values(two["figures"]) == {"replicas at base": 1, "replicas at peak": 1, "minimum": 2, "maximum": 2}
    # An L4 is planned with 32,000. Cluster one: 280,000 - 3 x 80,000 = 40,000 / 32,000 = 1.25 -> 2; without any half,
    # 280,000 / 32,000 = 8.75 -> 9.
    assert l4["rate"]["measured"] is False
    assert values(l4["figures"])["rate, assumed"] == 40_000
    assert values(l4["clusters"][0]["figures"]) == {
        "replicas at base": 0,
        "replicas at peak": 2,
        "minimum": 0,
        "maximum": 9,
    }
    # Cluster two: 70,000 / 32,000 = 2.2 -> 3. No half can be added there, so the L4 has the overflow:
    # 0.2 x 1,500 x min(150, 200) / 40,000 = 1.1 -> 2.
    assert values(l4["clusters"][1]["figures"]) == {
        "replicas at base": 0,
        "replicas at peak": 0,
        "minimum": 0,
        "maximum": 3,
        "overflow": 2,
    }
    (warning,) = (each for each in found["warnings"] if "overflow" in each)
    assert warning.startswith("one: the overflow of embed-half is 0 instead of 1: the cluster can have 3 of a100-40gb")


@pytest.mark.usefixtures("folder")
def test_a_table_at_the_end_has_the_replicas_of_all_flavors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["deploy", "--explain"]) == 0
    _, _, table = capsys.readouterr().out.partition("Replicas\n")
    rows = [line.split() for line in table.partition("\n\n")[0].splitlines()[2:]]
    found = document(capsys)["models"][0]["flavors"]
    wanted = []
    for flavor in found:
        for cluster in flavor["clusters"]:
            figures = values(cluster["figures"])
            most = figures["maximum"]
            counts = [figures["minimum"], max(figures["minimum"], min(most, figures["replicas at peak"])), most]
            wanted.append([flavor["name"], cluster["name"], *map(str, counts), str(figures.get("overflow", 0))])
    assert rows == wanted
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: none of --output, --explain, --preview, --lint and --json is given"),
        (["--explain", "--kubernetes-version", "new"], "'new' is not a version of Kubernetes"),
        (["--explain", "--kubernetes-version", "1.31"], "'1.31' is not supported"),
        (["--explain", "--clusters", "absent.yaml"], "absent.yaml cannot be read"),
        (["--explain", "-f", "absent.yaml"], "absent.yaml not found"),
        (["--explain", "-f", "inferctl.yaml", "-f", "inferctl.yaml"], "two specs have the name embed"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_wrong_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["deploy", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_the_clusters_file_is_next_to_the_spec(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = folder / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    assert [each["name"] for each in document(capsys, "-f", "../inferctl.yaml")["clusters"]] == ["one", "two"]


def test_one_key_can_have_the_whole_traffic_of_the_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLE)
    found = document(capsys, "-f", "embed.yaml", "-f", "generate.yaml")
    limits = {"embed": ("requests_per_minute", 1, 3000), "generate": ("tokens_per_minute", 640, 30)}
    for model in found["models"]:
        key, size, peak = limits[model["name"]]
        limit = yaml.safe_load(Path(f"{model['name']}.yaml").read_text())["access"][key]
        assert 60 * peak * size <= limit
        # NATS is in each cluster. Two servers always run there.
        assert (model["key_servers"]["value"], model["key_servers"]["formula"]) == (2, "min(2, 2, 2)")
        for number, cluster in enumerate(found["clusters"]):
            figures = [values(flavor["clusters"][number]["figures"]) for flavor in model["flavors"]]
            least = sum(each.get("minimum", 0) for each in figures)
            # Without NATS, each server applies half of the limit.
            assert least * limit / 2 >= 60 * peak * size * cluster["share"]


def test_the_sample_receipts_are_those_of_their_script(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("sample_receipts", EXAMPLE / "sample_receipts.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for task, rows in (("embed", script.EMBED), ("generate", script.GENERATE)):
        for row in rows:
            made = receipt.write(tmp_path / "made.json", script.document(task, row))
            assert made.data == receipt.load(EXAMPLE / "receipts" / f"{task}-{row[0]}.json").data


@pytest.mark.parametrize("version", ["1.36", "v1.36", "1.36.2", "v1.36.2-eks-1234"])
def test_a_version_may_have_a_patch_and_a_v(folder: Path, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {each["kubernetes"] for each in document(capsys, "--kubernetes-version", version)["clusters"]} == {"1.36"}
    (folder / "clusters.yaml").write_text(f"clusters: [{{name: one, kubernetes: {version}}}]\n")
    assert document(capsys)["clusters"][0]["kubernetes"] == "1.36"


def test_the_arithmetic_needs_no_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = yaml.safe_load(SPEC)
    del spec["deploy"]["flavors"][1]["image"]
    (folder / "inferctl.yaml").write_text(yaml.safe_dump(spec))
    assert cli.run(["deploy", "--explain"]) == 0
    printed = capsys.readouterr()
    assert "deploy.flavors[1] has no image" in " ".join(printed.err.split())
    words = " ".join(printed.out.split())
    assert " 1 replica " in words and " 1 replicas" not in words
    assert cli.run(["deploy", "--output", str(folder / "out")]) == 2
    assert "deploy.flavors[1] has no image" in " ".join(capsys.readouterr().err.split())


def test_all_errors_of_flavors_are_shown_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = SPEC.replace("half.json", "absent.json").replace("hardware: l4", "hardware: l5")
    (folder / "inferctl.yaml").write_text(wrong)
    assert cli.run(["deploy", "--explain"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "2 errors deploy.flavors[0]: cannot read" in shown and "no such file or directory" in shown
    assert "deploy.flavors[1]: hardware 'l5' not found" in shown and "Errno" not in shown


def test_a_spec_without_flavors_names_its_hardware(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "inferctl.yaml").write_text(
        "name: embed\nmodel: {source: org/embed, task: embed, weights: bake}\nhardware: [l4]\nimage: {tag: a}\n"
    )
    assert cli.run(["deploy", "--explain"]) == 2
    shown = capsys.readouterr().err
    assert "hardware l4 has no min_replicas" in shown and "deploy.flavors" not in shown
