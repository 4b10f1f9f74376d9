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

`make docs` writes this page from the program itself, and a test compares the two. A command prints its result on
stdout and everything for people on stderr. With `--json` the result is one JSON document.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | failed, or a regression was found |
| 2 | usage or spec error |
| 3 | Docker, registry, GPU, port or disk not ready, or stdout cannot be written |
| 4 | not enough evidence |
| 5 | invalid run |
| 130 | interrupted by Ctrl-C or SIGTERM |

If a command with `--json` fails before it has a result, stdout is this document. `problems` lists the errors of a
file one by one:

```json
{"error": {"message": "...", "hint": "...", "exit_code": 2,
           "problems": [{"file": "inferctl.yaml", "line": 3, "path": "serve.port", "message": "...", "hint": "..."}]}}
```

If the reader of stdout is gone (`| head -1`) or stdout is closed, the command drops its output and keeps its exit code.
A stderr that cannot be written never changes the exit code.
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
