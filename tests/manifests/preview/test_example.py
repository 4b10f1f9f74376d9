"""The preview of the example in docs/examples/kubernetes: specs, rendered manifests, kubectl and nodes together."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl import cli

# One preview for all tests.
pytestmark = pytest.mark.xdist_group("preview_example")
EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "kubernetes"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the preview as JSON. The example is previewed once for all tests."""
    output = io.StringIO()
    specs = [argument for name in ("embed", "generate") for argument in ("-f", str(EXAMPLE / f"{name}.yaml"))]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert cli.run(["deploy", *specs, "--preview", str(EXAMPLE / "nodes.yaml"), "--json"]) == 0
    found: dict[str, Any] = json.loads(output.getvalue())
    return found


def deployment(result: dict[str, Any], cluster: str, name: str) -> dict[str, Any]:
    parts = (part["deployments"] for part in result["clusters"] if part["name"] == cluster)
    (found,) = (each for deployments in parts for each in deployments if each["name"] == name)
    return dict(found)


def test_each_cluster_has_its_overlay(result: dict[str, Any]) -> None:
    assert [part["name"] for part in result["clusters"]] == ["aws-eu-central-1", "aws-us-east-1", "gcp-europe-west4"]
    assert result["fits_at_rest"]
    for cluster, gpu in (("aws-eu-central-1", "nvidia.com/mig-3g.20gb"), ("gcp-europe-west4", "nvidia.com/gpu")):
        assert gpu in deployment(result, cluster, "embed-a100-half")["requests"]


def test_the_peak_needs_what_the_annotations_say(result: dict[str, Any]) -> None:
    # Half of 3,000 x 250 tokens/s, 0.7 x 100,000 per replica: 375,000 / 70,000 = 5.4, so 6. L4 and T4 are not needed.
    first = deployment(result, "aws-eu-central-1", "embed-a100-half")
    assert (first["tokens_per_second"], first["at_peak"]) == (100_000, 6)
    assert deployment(result, "aws-eu-central-1", "embed-l4")["at_peak"] == 0
    # A quarter without A100: 187,500 / 42,000 = 4.5, so 5.
    assert deployment(result, "aws-us-east-1", "embed-l4")["at_peak"] == 5


def test_a_lost_cluster_is_compared_with_the_whole_peak(result: dict[str, Any]) -> None:
    (loss,) = (
        each
        for each in result["drills"]
        if (each["scope"], each["place"], each["model"]) == ("cluster", "aws-eu-central-1", "embed")
    )
    # 5 L4 of 60,000 and 3 half A100 of 100,000 are left of the peak of 750,000.
    assert (loss["peak"], loss["capacity"]["at_once"]) == (750_000, 600_000)
    assert loss["share"]["at_once"] == 0.8


def test_the_nodes_have_all_slices_of_their_gpus() -> None:
    groups = yaml.safe_load((EXAMPLE / "nodes.yaml").read_text())["nodes"]
    slices = {each["allocatable"].get("nvidia.com/mig-3g.20gb") for each in groups} - {None}
    # all-3g.20gb makes two slices of each A100, and a p4d.24xlarge has eight.
    assert slices == {2 * 8}
