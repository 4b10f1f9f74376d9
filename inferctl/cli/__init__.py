"""The command line: one thin file a verb. This file turns an `InferctlError` into message and exit code; `console.py` alone prints.

A verb's file is imported when that verb runs. Nothing heavy is imported here or at the top of such a file:
`inferctl --help` must cost little more than importing Typer.
"""

from __future__ import annotations

import errno
import signal
import sys
from itertools import pairwise
from typing import Annotated, ClassVar

import typer
from typer.exceptions import TyperException

import inferctl
from inferctl.cli import console, streams
from inferctl.cli.lazy import Command, LazyGroup
from inferctl.errors import EXIT_INTERRUPTED, InferctlError, NotReadyError, UsageError


class Root(LazyGroup):
    """The commands of `inferctl`."""

    # The order is that of `inferctl --help`: the way of a model from a file to a measured container, then the rest.
    table: ClassVar = {
        "init": Command("inferctl.cli.init", "init", "Write a commented inferctl.yaml."),
        "check": Command("inferctl.cli.check", "check", "Validate the spec; say what fits which hardware."),
        "pin": Command("inferctl.cli.pin", "pin", "Write digests and commits into the spec."),
        "render": Command("inferctl.cli.render", "render", "Print the Dockerfile, or write all it needs."),
        "build": Command("inferctl.cli.build", "build", "Build, verify, name and push the image."),
        "verify": Command("inferctl.cli.verify", "verify", "Check an image: start it, compare with fp32."),
        "push": Command("inferctl.cli.push", "push", "Push an image; print its name@digest."),
        "pull": Command("inferctl.cli.pull", "pull", "Pull an image; print its name@digest."),
        "serve": Command("inferctl.cli.serve", "serve", "Serve embeddings over HTTP, OpenAI-compatible."),
        "bench": Command("inferctl.cli.bench", "bench", "Measure latency, throughput and quality."),
        "compare": Command("inferctl.cli.compare", "compare", "Say whether a measurement became worse."),
        "estimate": Command(
            "inferctl.cli.estimate", "estimate", "Estimate latency, throughput and cost on other hardware."
        ),
        "capacity": Command("inferctl.cli.capacity", "capacity", "Turn a receipt into capacity.json."),
        "doctor": Command("inferctl.cli.doctor", "doctor", "Say what this machine can do."),
        "config": Command("inferctl.cli.settings", "config", "Print each setting and where it came from."),
        "schema": Command("inferctl.cli.settings", "schema", "Print the JSON Schema of inferctl.yaml."),
        "lock": Command("inferctl.cli.lock", "lock", "Resolve the hashed locks of an image."),
        "catalog": Command("inferctl.cli.catalog", "app", "Known bases, stacks, hardware; with sources."),
    }


app = typer.Typer(
    cls=Root,
    name="inferctl",
    help="Build, serve and benchmark model containers: one spec file, one standard image, numbers you can defend.",
    epilog="Start with `inferctl init`, or without any file: `inferctl serve --model DIR`.",
    invoke_without_command=True,
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    console.help_without_command(context)


# Failures of the machine that can strike any command, and the way out of each.
_OF_THE_MACHINE = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "free some space within your quota, or name another folder",
    errno.EROFS: "the file system is read-only: name another folder",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EIO: "`dmesg` shows what the disk reports",
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`",
    errno.ENFILE: "the machine has too many open files: close some programs",
    errno.ELOOP: "a symbolic link leads back to itself: remove it",
    errno.ENAMETOOLONG: "use a shorter name",
}


def main() -> None:
    """Run the command line; ends the process with the exit code that `inferctl.errors` documents."""
    streams.guard()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are printed, bugs are raised."""
    console.expect_document(bool({"--json", "--format=json"} & {*arguments, *map("=".join, pairwise(arguments))}))
    try:
        try:
            # `inferctl.__main__` blocks these during the imports.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            code = _run(arguments)
            # A full disk may show only here.
            sys.stdout.flush()
        except InferctlError as error:
            return console.fail(error)
    # Outside, since Ctrl-C may arrive while the error is printed.
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    # Typer turns Ctrl-C into this exit code.
    return console.interrupt() if code == EXIT_INTERRUPTED else code


def _terminate(*_: object) -> None:
    """Take SIGTERM, which CI systems send, like Ctrl-C: children end and temporary files go on the way out."""
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    try:
        return int(app(arguments, prog_name="inferctl", standalone_mode=False) or 0)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "inferctl"
        message = error.format_message().rstrip(".").replace("Input should", "must")
        hint = f"`{command} --help` lists what it takes"
        raise UsageError(message[:1].lower() + message[1:], hint) from None
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f": {error.filename}" if error.filename else ""
        raise NotReadyError(f"{(error.strerror or str(error)).lower()}{where}", _OF_THE_MACHINE[error.errno]) from None
