"""Checks that messages, help and docstrings name only options that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from inferctl import cli

PACKAGE = Path(__file__).resolve().parents[2] / "inferctl"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "_assets" not in file.parts)
# Options of other programs, which messages name next to that program.
OTHER_PROGRAMS = {
    "--chown": "Dockerfile COPY",
    "--dest": "pip download",
    "--disable-log-stats": "vllm serve",
    "--dtype": "vllm serve",
    "--enable-prompt-tokens-details": "vllm serve",
    "--field-selector": "kubectl get",
    "--library": "python -m inferctl.serve.reference",
    "--link": "Dockerfile COPY",
    "--middleware": "vllm serve",
    "--max-tokens": "python -m inferctl.serve.reference",
    "--no-deps": "pip download",
    "--quantization": "vllm serve",
    "--progress": "docker buildx build",
    "--require-hashes": "pip install",
    "--shm-size": "docker run",
    "--show-labels": "kubectl get",
    "--stream-interval": "vllm serve",
    "--task": "python -m inferctl.serve.reference",
    "--use": "docker buildx create",
}


def options_of(command: Any) -> set[str]:
    """Return the options of a command and of all commands below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    below = (options_of(each) for each in getattr(command, "commands", {}).values())
    return own.union({"--help"}, *below)


@pytest.fixture(scope="module")
def known() -> set[str]:
    return options_of(get_command(cli.app)) | OTHER_PROGRAMS.keys()


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string. In f-strings, `{}` replaces each expression."""
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            values = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.lineno, node.value


def options_in(text: str) -> list[str]:
    """Return the options between backticks in `text`."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return [option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)]


def test_the_search_finds_options_in_backticks_and_in_f_strings() -> None:
    tree = ast.parse('a = f"pass `{command} --slo {slo}`"\nb = "--rate is absent; remove `--users 3`"')
    assert sorted(option for _, text in texts(tree) for option in options_in(text)) == ["--slo", "--users"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_each_option_in_backticks_exists(file: Path, known: set[str]) -> None:
    for line, text in texts(ast.parse(file.read_text(encoding="utf-8"))):
        for option in options_in(text):
            assert option in known, f"{file.name}:{line} names `{option}`, which no inferctl command has"
