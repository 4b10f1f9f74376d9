"""Run the fp32 reference in a process of its own, or with `--library` the library of the task.

The process is `python -m inferctl.serve.reference`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError

# What computes each task from raw text, for comparison.
LIBRARIES: Mapping[str, str] = {
    "embed": "sentence-transformers",
    "rerank": "sentence-transformers",
    "classify": "transformers",
}
PROGRAM = "inferctl.serve.reference"


class ReferenceFailedError(InferctlError):
    """The process failed. `reason` is one line, from its own error if it has one."""

    def __init__(self, reason: str, program: str = PROGRAM) -> None:
        what = "computation of the fp32 reference" if program == PROGRAM else "profile of the engine"
        super().__init__(f"the {what} failed: {reason}")
        self.reason = reason


def run(
    model: Path,
    inputs: Sequence[Any] | Mapping[str, Any],
    options: Sequence[str],
    on_wait: Callable[[float], None],
    program: str = PROGRAM,
) -> dict[str, Any]:
    """Return the JSON output for `inputs` of the reference, or another `program`. `on_wait` receives the seconds.

    Raises `ReferenceFailedError` if the process fails.
    """
    # -P: Python files in the current folder, such as that of the model, are not imported.
    arguments = [sys.executable, "-P", "-m", program, str(model.resolve()), *options]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(inputs).encode())
        stdin.seek(0)
        process = subprocess.Popen(arguments, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            passed = 0.0
            while process.poll() is None:
                on_wait(passed)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                passed += 0.5
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise ReferenceFailedError(_error_line(stderr.read().decode(errors="replace")), program)
        document: dict[str, Any] = json.loads(stdout.read())
    return document


def _error_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    return next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error:")),
        lines[-1] if lines else "no message",
    )
