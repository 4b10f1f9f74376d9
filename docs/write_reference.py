"""Writes docs/reference/ from the help of the command line, exit codes, keys of files, metrics and lint rules.

`make reference` runs it, and a test compares the result. `make site` also writes the page of the commands, which says
what their help says, and is not in the repository:

    python docs/write_reference.py [--commands]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

TARGET = Path(__file__).resolve().parent / "reference"
HEAD = """\
# Reference

`make reference` writes these pages from the program, and a test compares the two.

| page | has |
|---|---|
| `inferctl COMMAND --help` | every command with its options; `make site` writes a page of them |
| [Settings](settings.md) | the keys of `inferctl.yaml`, of a clusters file and of a plan |
| [Server](server.md) | endpoints and metrics |
| [Rules of the lint](lint.md) | what `inferctl deploy --lint` finds |

## Exit codes and output

A command prints its result on stdout and messages on stderr. With `--json` the result is one JSON document.
"""
JSON_ERRORS = """\
If a command with `--json` fails before it has a result, stdout is this document. `problems` lists the errors of a
file one by one:

```json
{"error": {"message": "...", "hint": "...", "exit_code": 2,
           "problems": [{"file": "inferctl.yaml", "line": 3, "path": "serve.port", "message": "...", "hint": "..."}]}}
```

If the reader of stdout is gone (`| head -1`) or stdout is closed, the command drops its output and keeps its exit code.
A stderr that cannot be written never changes the exit code.
"""
PLANS = """\
A plan is a YAML file for `inferctl bench --plan FILE`. [Plans](../bench.md#plans) has examples.
"""
METRICS = """\
A star (*) marks metrics that servers of generation do not have. [What their names do not say](../observability.md).
"""
ENDPOINTS = """\
All are POST, and have the same keys, limits and metering. Except `/tokenize`, they have the same cache and admission.
`GET /openapi.json` of a server describes its own. [Clients](../serve.md#use-a-client-library).
"""
RULES = """\
The level is that of the clearest case: a finding can have another one.
"""


def exit_codes() -> str:
    """Return the table of exit codes in the docstring of errors.py."""
    from inferctl.core import errors

    return "".join(f"{line}\n" for line in (errors.__doc__ or "").splitlines() if line.startswith("|"))


def help_of(*command: str) -> str:
    """Return the help of a command, 100 columns wide, without its examples."""
    from inferctl import cli

    printed, width = io.StringIO(), {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, width), contextlib.redirect_stdout(printed):
        cli.run([*command, "--help"])
    text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    return re.sub(r"\n\n  Examples?:.*?(?=\n\n[A-Z]|\Z)", "", text, flags=re.DOTALL) + "\n"

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.run([*command, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def commands() -> list[tuple[str, ...]]:
    """Return all commands and subcommands, in the order of `inferctl --help`."""
    import typer.main

    from inferctl import cli

    root: Any = typer.main.get_command(cli.app)
    found: list[tuple[str, ...]] = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found += [(name, below) for below in inner] if inner else [(name,)]
    return found


def keys(root: type[BaseModel], hidden: Collection[str] = ()) -> str:
    """Return a table of all keys of a document, without those in `hidden`."""
    rows = ["| key | default | description |", "|---|---|---|"]

    def section(annotation: Any) -> type[BaseModel] | None:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            key = prefix + name
            if key in hidden:
                continue
            if (inner := section(info.annotation)) and "[]." in key:  # of an item of a list, described at the whole
                own = [f"`{each}`" for each in inner.model_fields if f"{name}.{each}" not in hidden]
                rows.append(f"| `{key}` | - | As `{name}`, with its keys {', '.join(own)}. |")
                continue
            if inner:
                walk(inner, f"{key}.")
                continue
            default = (
                "required"
                if info.is_required()
                else f"`{info.get_default(call_default_factory=True)}`".replace("`None`", "-").replace("``", "-")
            )
            inner = next(filter(None, map(section, typing.get_args(info.annotation))), None)
            many = typing.get_origin(info.annotation) is list
            if inner and not many and default != "-":
                default = "below"
            rows.append(f"| `{key}` | {default} | {info.description} |")
            if inner:
                walk(inner, f"{key}[]." if many else f"{key}.")

    walk(root, "")
    return "\n".join(rows) + "\n"


def rules() -> str:
    """Return a table of the rules of the lint for each lesson."""
    from inferctl.manifests import lint

    parts = []
    for key, lesson in lint.LESSONS.items():
        found = [rule for rule in lint.RULES.values() if rule.lesson == key]
        rows = [f"| `{rule.id}` | {rule.level} | {rule.finds} |".replace("<", "&lt;") for rule in found]
        parts.append(
            "\n".join([f"**{key.capitalize()}.** {lesson}\n", "| rule | level | finds |", "|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def metrics() -> str:
    """Return a table of the metrics of servers, named as in `/metrics`."""
    from inferctl.serve.observe.metrics import Metrics, RequestMetrics

    def families(server: RequestMetrics) -> dict[str, tuple[str, str, str]]:
        """Return type, labels and description of each metric by its name."""
        server.watch_threads("api")
        server.watch_budgets(lambda *_: 0)
        server.watch_outbox(typing.cast(Any, types.SimpleNamespace(depth=0, age=0, dropped=0)))
        labels = {
            getattr(collector, "_name", None): getattr(collector, "_labelnames", ())
            for collector in server.registry._collector_to_names
        }
        return {
            each.name + ("_total" if each.type == "counter" else ""): (
                each.type,
                ", ".join(f"`{name}`" for name in labels.get(each.name, getattr(each, "_labelnames", ()))),
                each.documentation,
            )
            for each in server.registry.collect()
        }

    encoders = Metrics()
    encoders.watch_capacity(dict)
    every = families(RequestMetrics())
    rows = ["| metric | type | labels | description |", "|---|---|---|---|"]
    rows += [f"| `{name}` | {' | '.join(values)} |" for name, values in every.items()]
    rows += [
        f"| `{name}` * | {' | '.join(values)} |" for name, values in families(encoders).items() if name not in every
    ]
    return "\n".join(rows) + "\n"


def endpoints() -> str:
    """Return the table of the endpoints of the encoder tasks."""
    from inferctl.serve.api.app import ALL

    tasks: dict[str, list[str]] = {}
    for endpoint in ALL:
        paths = ", ".join(f"`{path}`" for path in endpoint.paths)
        shape = endpoint.errors[1].__name__.removesuffix("ErrorResponse") or "OpenAI"
        shape = {"Tei": "text-embeddings-inference"}.get(shape, shape)
        tasks.setdefault(f"{paths} | {endpoint.summary} | {shape} |", []).append(endpoint.needs)
    rows = ["| task | endpoint | what it does | errors |", "|---|---|---|---|"]
    return "\n".join([*rows, *(f"| {', '.join(needs)} | {row}" for row, needs in tasks.items())]) + "\n"


def commands_page() -> str:
    """Return the page with the help of all commands."""
    parts = [f"## {' '.join(['inferctl', *each])}\n\n```text\n{help_of(*each)}```\n" for each in [(), *commands()]]
    return "\n".join(["# Commands\n", *parts])


def pages() -> dict[str, str]:
    """Return the pages of the repository by their file names."""
    from inferctl.bench.plan.plan import Plan
    from inferctl.config.spec import Spec
    from inferctl.deploy.clusters import Clusters

    plan = keys(Plan, {"load.task", "load.auto_users", "load.capacity_percent"})
    parts = {
        "index": [HEAD, exit_codes(), JSON_ERRORS],
        "settings": [
            *("# Settings\n", "## Keys of inferctl.yaml\n", keys(Spec)),
            *("## Keys of a clusters file\n", keys(Clusters), "## Keys of a plan\n", PLANS, plan),
        ],
        "server": [
            *("# Server\n", "## Endpoints of a server\n", ENDPOINTS, endpoints()),
            *("## Metrics of a server\n", METRICS, metrics()),
        ],
        "lint": ["# Rules of the lint\n", RULES, rules()],
    }
    return {f"{name}.md": "\n".join(each) for name, each in parts.items()}


if __name__ == "__main__":
    written = {"commands.md": commands_page()} if "--commands" in sys.argv else pages()
    for name, text in written.items():
        (TARGET / name).write_text(text, encoding="utf-8")
        print(TARGET / name)
