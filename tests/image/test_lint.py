"""Tests that the check of a built image finds secrets and root users, and reports nothing without them."""

from __future__ import annotations

import pytest

from inferctl.image import lint


@pytest.mark.parametrize(
    ("environment", "user", "topics"),
    [
        ({"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false", "EMPTY_TOKEN": ""}, "10001:10001", []),
        ({"HF_TOKEN": "x"}, "10001", ["secret-in-image"]),
        ({"PIP_INDEX_URL": "https://user:pass@index.example.com/simple"}, "10001", ["secret-in-image"]),
        ({"NOTE": "hf_abcdefghijklmnopqrstuvwxyz"}, "10001", ["secret-in-image"]),
        *(({}, user, ["runs-as-root"]) for user in ("", "0", "root", "root:root", "0:0")),
    ],
)
def test_secrets_and_root_users_are_errors(environment: dict[str, str], user: str, topics: list[str]) -> None:
    found = lint.check_built_image(environment, user)
    assert [(finding.topic, finding.level) for finding in found] == [(topic, "error") for topic in topics]
    assert all(finding.what and finding.why and finding.hint for finding in found)
