"""The server as a container starts it: `python -m inferctl.serve`. It needs what serves and nothing else, so not Typer.

`inferctl serve` has the same options. `inferctl serve --image` passes those in `FORWARDED` on to the container.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from inferctl.errors import EXIT_INTERRUPTED, InferctlError, UsageError

# Option -> the setting that it gives.
SETTINGS = {
    "model": "model.source",
    "name": "name",
    "precision": "serve.precision",
    "host": "serve.host",
    "port": "serve.port",
    "max_batch_tokens": "serve.max_batch_tokens",
    "max_input_tokens": "serve.max_input_tokens",
    "max_queue_tokens": "serve.max_queue_tokens",
}
# Options that a server in a container accepts from outside. Host, port and model belong to the container.
FORWARDED = (
    "precision",
    "name",
    "max_batch_tokens",
    "max_input_tokens",
    "max_queue_tokens",
    "device",
    "hang_seconds",
    "log",
    "engine",
    "engines",
    "truncate",
)


def arguments(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The options `given` (name -> value) of those in `FORWARDED`, as a command line."""
    made: list[str] = []
    for name in FORWARDED:
        if name in given:
            value = given[name]
            # `--engines 1` has a value too, and 1 equals True.
            switch = isinstance(value, bool)
            made += [_option(name if value else f"no_{name}")] if switch else [_option(name), str(value)]
    return tuple(made)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m inferctl.serve`. One that is not given is absent from the result."""
    made = _Parser(prog="python -m inferctl.serve", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    made.description = "Serve embeddings over HTTP, OpenAI-compatible. `inferctl serve --help` explains the options."
    made.add_argument("--spec", metavar="FILE", type=Path)
    for name in SETTINGS:
        number = name == "port" or name.startswith("max_")
        made.add_argument(_option(name), metavar="N" if number else "TEXT", type=int if number else str)
    made.add_argument("--device", metavar="NAME")
    made.add_argument("--truncate", action=argparse.BooleanOptionalAction)
    made.add_argument("--announce", metavar="FILE", type=Path)
    made.add_argument("--capacity", metavar="FILE", type=Path)
    made.add_argument("--hang-seconds", metavar="S", type=_at_least(float, 0.1))
    made.add_argument("--log", metavar="STYLE")
    made.add_argument("--image-reference", help=argparse.SUPPRESS)
    made.add_argument("--engine", help=argparse.SUPPRESS)
    made.add_argument("--engines", type=_at_least(int, 1), help=argparse.SUPPRESS)
    return made


def main(command_line: list[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    given = vars(parser().parse_args(command_line))
    from inferctl import settings

    file = given.pop("spec", None) or os.environ.get("INFERCTL_SPEC")
    flags = {path: given.pop(name, None) for name, path in SETTINGS.items()}
    resolved = settings.resolve(settings.read(Path(file)) if file else None, os.environ, flags)
    for warning in resolved.warnings:
        _say(f"warning: {warning}")
    from inferctl.serve import server, tracing

    image = reference(given.pop("image_reference", None))
    options = server.Options(**given, image=image, traces=tracing.wanted(os.environ))
    return server.run(resolved.spec, options, _say)


def reference(image: str | None) -> tuple[str, str | None] | None:
    """`name@digest` -> (name, digest), as `server.Options` takes the image that a server runs in."""
    name, _, digest = (image or "").partition("@")
    return (name, digest or None) if name else None


def exit_with(run: Callable[[], int]) -> NoReturn:
    """End the process with what `run` returns, or with the message and the exit code of its error."""
    try:
        code = run()
    except InferctlError as error:
        _say(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"`{self.prog} --help` lists the options")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        found = kind(text)
        if not found >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least:g}")
        return found

    number.__name__ = "number"
    return number


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
