"""Write docs/reference.md from the command line's own help, and the spec's keys from its schema. `make docs` runs it; a test compares.

python docs/write_reference.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent / "reference.md"
HEAD = """\
# Reference

Written by `make docs` from the program itself; a test holds the two together. What a command prints for people goes to stderr, its result to
stdout; `--json` makes the result one JSON document. Exit codes: 0 ok, 1 failed or a regression, 2 usage or spec mistake, 3 Docker, registry,
GPU or port not ready, 4 not enough evidence, 5 invalid run, 130 interrupted.
"""


def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "inferctl", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def commands() -> list[tuple[str, ...]]:
    """Every verb, and the verbs under a group, in the order of `inferctl --help`."""
    import typer.main

    from inferctl import cli

    root: Any = typer.main.get_command(cli.app)
    found: list[tuple[str, ...]] = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found += [(name, below) for below in inner] if inner else [(name,)]
    return found


def settings() -> str:
    """A table of every key of inferctl.yaml."""
    from pydantic import BaseModel

    from inferctl.spec import Spec

    rows = ["| key | default | what it says |", "|---|---|---|"]

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, info in section.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                walk(annotation, f"{prefix}{name}.")
                continue
            default = (
                "required"
                if info.is_required()
                else f"`{info.get_default(call_default_factory=True)}`".replace("`None`", "-")
            )
            rows.append(f"| `{prefix}{name}` | {default} | {info.description} |")

    walk(Spec, "")
    return "\n".join(rows) + "\n"


def reference() -> str:
    parts = [HEAD, "## inferctl\n", f"```text\n{help_of()}```\n"]
    for command in commands():
        parts += [f"## inferctl {' '.join(command)}\n", f"```text\n{help_of(*command)}```\n"]
    parts += ["## Keys of inferctl.yaml\n", settings()]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET)
