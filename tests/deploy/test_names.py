"""Names that are too long for what Kubernetes, its extensions or `inferctl bench` make of them are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

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
