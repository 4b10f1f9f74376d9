"""Names that are too long for what Kubernetes, its extensions or `inferctl bench` make of them are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from inferctl import cli
from inferctl.bench.plan import shape
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from tests.deploy import plans


def rendered(model: int, flavor: int, **deploy: Any) -> dict[str, str]:
    """Return the files for a model and a flavor with names of these lengths."""
    flavors = [{**plans.FLAVORS[1], "name": "f" * flavor, "min_replicas": 2, "max_replicas": 2}]
    spec = plans.embed(flavors=flavors, **deploy).model_copy(update={"name": "m" * model})
    return layout.files(plans.plan(spec, clusters=plans.ONE_CLUSTER))


@pytest.mark.parametrize(
    ("longest", "deploy", "why"),
    [
        # A Deployment has the name MODEL-FLAVOR. Of its pods, 17 of 63 characters are hashes.
        (46, {"bench": False}, "pod"),
        (46, {"bench": False, "scaling": "none"}, "pod"),
        # `inferctl bench` names a server with 40 characters at most.
        (40, {"bench": True}, "bench"),
    ],
)
def test_a_name_may_have_so_many_characters(longest: int, deploy: dict[str, Any], why: str) -> None:
    for model in (1, 20, longest - 2):
        assert rendered(model, longest - 1 - model, **deploy)
        with pytest.raises(UsageError) as caught:
            rendered(model, longest - model, **deploy)
        assert str(longest) in caught.value.message and why in caught.value.message
        assert "name" in str(caught.value.hint)


def test_the_limit_of_bench_is_that_of_a_configuration() -> None:
    TypeAdapter(shape.Name).validate_python("n" * layout.LONGEST_BENCH)
    with pytest.raises(ValidationError):
        TypeAdapter(shape.Name).validate_python("n" * (layout.LONGEST_BENCH + 1))


@pytest.mark.parametrize("name", ["a" * 41, "a" * 46])
def test_nothing_is_written_with_a_name_that_fails_later(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        "name": name[:-3],
        "model": {"source": "org/x", "task": "embed", "weights": "bake"},
        "deploy": {
            "namespace": "x",
            "bench": True,
            "tools_image": plans.TOOLS,
            "flavors": [{"hardware": "l4", "min_replicas": 1, "max_replicas": 1, "image": plans.FLAVORS[1]["image"]}],
        },
    }
    file = tmp_path / "inferctl.yaml"
    file.write_text(json.dumps(spec))
    output = tmp_path / "manifests"
    assert cli.run(["deploy", "-f", str(file), "--output", str(output)]) == 2
    assert "40" in capsys.readouterr().err
    assert not output.exists()
