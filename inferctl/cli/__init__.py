"""The command line: one thin file a verb. This file turns an `InferctlError` into message and exit code; `console.py` alone prints.

Nothing heavy is imported here or at the top of a verb's file: `inferctl --help` must cost little more than importing Typer.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

import inferctl
from inferctl.cli import (
    bench,
    build,
    capacity,
    catalog,
    check,
    compare,
    console,
    doctor,
    estimate,
    init,
    lock,
    push,
    render,
    serve,
    settings,
)
from inferctl.errors import EXIT_INTERRUPTED, InferctlError, UsageError

app = typer.Typer(
    name="inferctl",
    help="Build, serve and benchmark model containers: one spec file, one standard image, numbers you can defend.",
    epilog="Start with `inferctl init`, or without any file: `inferctl serve --model DIR`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"inferctl {inferctl.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


# In the order in which `inferctl --help` lists them: the way of a model from a file to a measured container.
app.command("init", short_help="Write a commented inferctl.yaml.")(init.init)
app.command("check", short_help="Validate the spec; say what fits which hardware.")(check.check)
app.command("render", short_help="Print the Dockerfile, or write all it needs.")(render.render)
app.command("build", short_help="Build, verify, name and push the image.")(build.build)
app.command("push", short_help="Push an image; print its name@digest.")(push.push)
app.command("serve", short_help="Serve embeddings over HTTP, OpenAI-compatible.", epilog=serve.EPILOG)(serve.serve)
app.command("bench", short_help="Measure latency, throughput and quality.", epilog=bench.EPILOG)(bench.bench)
app.command("compare", short_help="Say whether a measurement became worse.")(compare.compare)
app.command("estimate", short_help="Estimate hardware that is not here.")(estimate.estimate)
app.command("capacity", short_help="Turn a receipt into capacity.json.", epilog=capacity.EPILOG)(capacity.capacity)
app.add_typer(catalog.app, name="catalog", short_help="Known bases, stacks, hardware; with sources.")
app.command("doctor", short_help="Say what this machine can do.")(doctor.doctor)
app.command("config", short_help="Print each setting and where it came from.")(settings.config)
app.command("schema", short_help="Print the JSON Schema of inferctl.yaml.")(settings.schema)
app.command("lock", short_help="Resolve the hashed locks of an image.")(lock.lock)


def main() -> None:
    """Run the command line; ends the process with the exit code that `inferctl.errors` documents."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are printed, bugs are raised."""
    try:
        code = int(app(arguments, prog_name="inferctl", standalone_mode=False) or 0)
    except InferctlError as error:
        console.error(error)
        return error.exit_code
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "inferctl"
        message = error.format_message().rstrip(".")
        console.error(UsageError(message[:1].lower() + message[1:], f"`{command} --help` lists what it takes"))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    # Typer makes Ctrl-C this exit code by itself.
    if code == EXIT_INTERRUPTED:
        console.note("interrupted")
    return code
