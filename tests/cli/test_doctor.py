"""What `inferctl doctor` shows: every character of it, and what the builder at hand can do."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from inferctl.cli.doctor import Check, features, table_of
from inferctl.image.buildx import Builder

CLASSIC = Builder((0, 13, 1), "default", "docker", ("linux/amd64", "linux/386"), False)


def shown(*checks: Check) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    with console.capture() as said:
        console.print(table_of(list(checks)))
    return said.get()


@pytest.mark.parametrize("text", ["pip install 'inferctl[serve]'", "it said [/x] and [bold]", "[red]"])
def test_brackets_in_a_message_are_shown(text: str) -> None:
    assert shown(Check(text, "can", text, text)).count(text) == 3


def test_a_classic_builder_says_what_it_lacks_and_how_to_get_it() -> None:
    found = features(CLASSIC)
    assert found.verdict == "limited"
    assert found.detail == (
        "for linux/amd64, linux/386; without: cache export, OCI archives, several platforms at once, SBOM and provenance, "
        "Dockerfile check"
    )
    assert found.hint == "docker buildx create --use --driver docker-container"


def test_a_builder_that_has_it_all_is_able() -> None:
    found = features(dataclasses.replace(CLASSIC, driver="docker-container", version=(0, 19, 0)))
    assert (found.verdict, found.hint) == ("can", None)
    assert found.detail.startswith("for linux/amd64, linux/386; with: cache export")
    assert "without" not in found.detail
