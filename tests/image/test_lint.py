"""Tests that each lint finds its problem and reports nothing without it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from inferctl.image import lint
from inferctl.models.fit import Finding

CLEAN = "FROM x\nENV PYTHONPATH=/a HOME=/tmp TOKENIZERS_PARALLELISM=false\nUSER 10001\n"


def codes(found: Iterable[Finding]) -> list[tuple[str, str]]:
    told = list(found)
    for finding in told:
        assert finding.why
        assert finding.hint
    return [(finding.topic, finding.level) for finding in told]


def test_a_valid_image_has_no_findings() -> None:
    assert codes(lint.secrets_in_dockerfile(CLEAN)) == []
    assert lint.check_built_image({"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}, "10001:10001") == []


@pytest.mark.parametrize(
    "line",
    [
        "ARG HF_TOKEN",
        "ARG PIP_PASSWORD=x",
        "ENV API_KEY=abc PATH=/x",
        "ENV A=1 \\\n    AWS_SECRET_ACCESS_KEY=x",
        "ENV PIP_INDEX_URL=https://user:pass@index.example.com/simple",
        "LABEL note=hf_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_secrets_in_the_dockerfile_are_errors(line: str) -> None:
    assert set(codes(lint.secrets_in_dockerfile(f"{CLEAN}{line}\n"))) == {("secret-in-image", "error")}


def test_secrets_in_the_environment_of_the_image_are_errors() -> None:
    found = lint.check_built_image({"HF_TOKEN": "x", "EMPTY_TOKEN": ""}, "10001")
    assert codes(found) == [("secret-in-image", "error")]
    assert "HF_TOKEN" in found[0].what


@pytest.mark.parametrize("user", ["", "0", "root", "root:root", "0:0"])
def test_an_image_that_runs_as_root_is_an_error(user: str) -> None:
    assert codes(lint.check_built_image({}, user)) == [("runs-as-root", "error")]
