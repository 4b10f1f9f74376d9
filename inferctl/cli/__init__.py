"""The command line. `Root.table` names the module of each command, which is imported only if that command runs.

This module turns an `InferctlError` into a message and an exit code. Only `console.py` prints. No module imports heavy
packages at its top: `inferctl --help` must cost little more than `import typer`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from itertools import pairwise
from typing import Annotated, ClassVar

import typer
from typer.exceptions import TyperException

import inferctl
from inferctl.cli import console
from inferctl.cli.lazy import Command, LazyGroup
from inferctl.core import streams
from inferctl.core.errors import EXIT_INTERRUPTED, InferctlError, NotReadyError, UsageError, without_addresses


class Root(LazyGroup):
    """The commands of `inferctl`."""

    # The order of `inferctl --help`: from a spec to a measured container, then the other commands.
    table: ClassVar = {
        "init": Command("inferctl.cli.init", "init", "Write a commented inferctl.yaml."),
        "check": Command("inferctl.cli.check", "check", "Check the spec, and on which hardware it can run."),
        "pin": Command("inferctl.cli.pin", "pin", "Write image digests and model commits into the spec."),
        "render": Command("inferctl.cli.render", "render", "Print the Dockerfile, or write its build context."),
        "build": Command("inferctl.cli.build", "build", "Build, verify, tag and push the image."),
        "verify": Command("inferctl.cli.verify", "verify", "Start an image and compare its output with fp32."),
        "pull": Command("inferctl.cli.pull", "pull", "Pull an image and print its name@digest."),
        "model": Command("inferctl.cli.model", "app", "Push, inspect and pull models as images of their own."),
        "convert": Command(
            "inferctl.cli.convert", "convert", "Convert pickled weights to safetensors, and a tokenizer."
        ),
        "merge": Command("inferctl.cli.merge", "merge", "Make one model of a base and a LoRA adapter."),
        "serve": Command("inferctl.cli.serve", "serve", "Serve a model with an OpenAI-compatible API."),
        "adapters": Command("inferctl.cli.adapters", "app", "Add and remove LoRA adapters of a running server."),
        "keys": Command("inferctl.cli.keys", "app", "Create, list, revoke and rotate API keys."),
        "gateway": Command("inferctl.cli.gateway", "gateway", "Balance requests between several servers with Envoy."),
        "embed": Command("inferctl.cli.embed", "embed", "Embed files of any length, resumable, without a server."),
        "space": Command("inferctl.cli.space", "app", "Show vector spaces, and how much a change of one matters."),
        "bench": Command("inferctl.cli.bench", "bench", "Measure latency, throughput and quality."),
        "compare": Command("inferctl.cli.compare", "compare", "Compare two benchmarks and detect regressions."),
        "estimate": Command(
            "inferctl.cli.estimate", "estimate", "Estimate latency, throughput and cost on other hardware."
        ),
        "deploy": Command("inferctl.cli.deploy", "deploy", "Write Kubernetes manifests from receipts."),
        "usage": Command("inferctl.cli.usage", "usage", "Sum up the usage that servers recorded, with prices."),
        "relay": Command("inferctl.cli.relay", "relay", "Bring usage events to the ledger."),
        "doctor": Command("inferctl.cli.doctor", "doctor", "Check what this machine can build, serve and measure."),
        "config": Command("inferctl.cli.settings", "config", "Print each setting and its source."),
        "schema": Command("inferctl.cli.settings", "schema", "Print the JSON Schema of inferctl.yaml."),
        "lock": Command("inferctl.cli.lock", "lock", "Resolve the hashed package locks of an image."),
        "catalog": Command("inferctl.cli.catalog", "app", "List known base images, torch stacks and hardware."),
    }


app = typer.Typer(
    cls=Root,
    name="inferctl",
    help="Build, serve, benchmark and deploy model containers.",
    epilog="To start, run `inferctl init`, or serve a model without a file: `inferctl serve --model DIR`.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(requested: bool) -> None:
    if requested:
        console.data(f"inferctl {inferctl.__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    console.help_without_command(context)


# System errors that can occur in any command, each with its hint.
_SYSTEM_ERROR_HINTS = {
    errno.ENOSPC: "free some space, or use another folder",
    errno.EDQUOT: "free some space within your quota, or use another folder",
    errno.EFBIG: "raise the limit of the file size (`ulimit -f`), or use another file system",
    errno.EROFS: "the file system is read-only: use another folder",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EIO: "check the disk: `dmesg` shows its errors",
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`",
    errno.ENFILE: "too many files are open on this machine: close some programs",
    errno.ELOOP: "remove the symbolic link that points to itself",
    errno.ENAMETOOLONG: "use a shorter name",
}


def main() -> None:
    """Run the command line and exit with a code of `inferctl.core.errors`."""
    streams.guard()
    # Child processes start with `python -m`. They must not import modules from the current folder, maybe a model.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Prints an `InferctlError`; other exceptions are bugs and propagate."""
    console.expect_document(bool({"--json", "--format=json"} & {*arguments, *map("=".join, pairwise(arguments))}))
    try:
        try:
            # `inferctl.__main__` blocks these during the imports.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            code = _run(arguments)
            # If the disk is full, the flush may be the first call that fails.
            sys.stdout.flush()
        except InferctlError as error:
            return console.fail(error)
    # The outer `try` also covers Ctrl-C while an error is printed.
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    # Typer returns this exit code after Ctrl-C.
    return console.interrupt() if code == EXIT_INTERRUPTED else code


def _terminate(number: int, _: object) -> None:
    """Handle SIGTERM like Ctrl-C, so that child processes end and temporary files are removed. CI systems send it."""
    raise KeyboardInterrupt(number)


def _run(arguments: list[str]) -> int:
    try:
        return int(app(arguments, prog_name="inferctl", standalone_mode=False) or 0)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "inferctl"
        message = without_addresses(error.format_message()).rstrip(".")
        message = message.replace("Input should", "must").replace("Value error, ", "")
        hint = f"see `{command} --help`"
        raise UsageError(message[:1].lower() + message[1:], hint) from None
    except OSError as error:
        if error.errno not in _SYSTEM_ERROR_HINTS:
            raise
        where = f": {error.filename}" if error.filename else ""
        raise NotReadyError(
            f"{(error.strerror or str(error)).lower()}{where}", _SYSTEM_ERROR_HINTS[error.errno]
        ) from None
