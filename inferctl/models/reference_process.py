"""Run the fp32 reference in a process of its own, or with `--library` the library of the task.

The process is `python -m inferctl.serve.reference`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.models import own_process

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
    code, output, lines = own_process.run(arguments, on_wait, json.dumps(inputs).encode())
    if code:
        own = (line.removeprefix("error: ") for line in lines if line.startswith("error:"))
        raise ReferenceFailedError(next(own, lines[-1] if lines else "no message"), program)
    document: dict[str, Any] = json.loads(output)
    return document
