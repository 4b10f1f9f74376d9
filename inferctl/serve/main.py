"""The command line of `python -m inferctl.serve`, which a container starts. It uses argparse, so images need no Typer.

`inferctl serve` has the same options. `inferctl serve --image` passes those in `FORWARDED` on to the container.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from inferctl.core import streams
from inferctl.core.errors import EXIT_INTERRUPTED, InferctlError, UsageError

# Option -> the setting that it sets.
SETTINGS = {
    "model": "model.source",
    "name": "name",
    "aliases": "serve.aliases",
    "precision": "serve.precision",
    "allow_inaccurate": "serve.allow_inaccurate",
    "host": "serve.host",
    "port": "serve.port",
    "max_batch_tokens": "serve.max_batch_tokens",
    "max_input_tokens": "serve.max_input_tokens",
    "max_queue_tokens": "serve.max_queue_tokens",
    "api_processes": "serve.api_processes",
    "max_context_tokens": "serve.max_context_tokens",
    "max_sequences": "serve.max_sequences",
    "kv_cache": "serve.kv_cache",
    "keys": "access.keys",
}
# Options that `inferctl serve --image` passes on. Host, port, model and keys belong to the container.
FORWARDED = (
    *(name for name in SETTINGS if name not in ("model", "host", "port", "keys")),
    *("device", "hang_seconds", "log", "engine", "engines", "truncate"),
)


def arguments(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options in `values` (name -> value) that are in `FORWARDED`, as a command line."""
    command_line: list[str] = []
    for name in FORWARDED:
        if name in values:
            value = values[name]
            # Not `value in (True, False)`: the value of `--engines 1` equals True.
            is_flag = isinstance(value, bool)
            command_line += [_option(name if value else f"no_{name}")] if is_flag else [_option(name), str(value)]
    return tuple(command_line)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m inferctl.serve`. Options that are not given are absent from the result."""
    options = Parser(prog="python -m inferctl.serve", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    options.description = "Serve a model over HTTP, OpenAI-compatible. `inferctl serve --help` explains the options."
    options.add_argument("--spec", metavar="FILE", type=Path)
    for name in SETTINGS.keys() - {"allow_inaccurate"}:
        number = name == "port" or name.startswith("max_")
        options.add_argument(_option(name), metavar="N" if number else "TEXT", type=int if number else str)
    options.add_argument("--device", metavar="NAME")
    for flag in ("--allow-inaccurate", "--truncate"):
        options.add_argument(flag, action=argparse.BooleanOptionalAction)
    options.add_argument("--announce", metavar="FILE", type=Path)
    options.add_argument("--hang-seconds", metavar="S", type=_at_least(float, 0.1))
    options.add_argument("--log", metavar="STYLE")
    options.add_argument("--image-reference", help=argparse.SUPPRESS)
    options.add_argument("--published", help=argparse.SUPPRESS)
    options.add_argument("--engine", help=argparse.SUPPRESS)
    options.add_argument("--engines", type=_at_least(int, 1), help=argparse.SUPPRESS)
    return options


def main(command_line: list[str]) -> int:
    """Serve until a signal arrives, and return the exit code."""
    values = vars(parser().parse_args(command_line))
    from inferctl.config import settings

    file = values.pop("spec", None) or os.environ.get("INFERCTL_SPEC")
    flags = {path: values.pop(name, None) for name, path in SETTINGS.items()}
    resolved = settings.resolve(settings.read(Path(file)) if file else None, os.environ, flags)
    for warning in resolved.warnings:
        _print(f"warning: {warning}")
    from inferctl.serve import start
    from inferctl.serve.observe import tracing
    from inferctl.serve.options import ServerOptions

    image = reference(values.pop("image_reference", None))
    options = ServerOptions(**values, image=image, traces=tracing.enabled(os.environ))
    return start.run(resolved.spec, options, _print)


def reference(image: str | None) -> tuple[str, str | None] | None:
    """Split `name@digest` into (name, digest), for `ServerOptions.image`."""
    name, _, digest = (image or "").partition("@")
    return (name, digest or None) if name else None


def exit_with(run: Callable[[], int]) -> NoReturn:
    """Exit with the code that `run` returns, or print its error and exit with the code of the error."""
    streams.guard()
    try:
        code = run()
    except InferctlError as error:
        _print(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` for wrong options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"`{self.prog} --help` lists the options")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least:g}")
        return value

    number.__name__ = "number"
    return number


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
