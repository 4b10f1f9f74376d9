"""Converts a model whose weights are pickles, or that has no `tokenizer.json`, to a folder that can be served.

`python -m inferctl.models.conversion` does the work in a process of its own, with bounded memory and time. The new
folder gets its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.core.partials import complete, partial_folder
from inferctl.core.sizes import size
from inferctl.models import model as model_folder
from inferctl.models import own_process
from inferctl.models.model import ModelFolder

# Called with the written bytes, and the bytes to write, estimated.
Progress = Callable[[int, int], None]

# The slowest import of torch and transformers took 40 s, on two cores with other load. Weights are read, written and
# hashed at this rate at least.
_START_S, _BYTES_PER_S = 300, 10_000_000
_PROGRAM = "inferctl.models.conversion"


def needed(folder: ModelFolder) -> bool:
    """Return whether a model has pickles instead of safetensors, a vocabulary but no `tokenizer.json`, or a Router."""
    path = folder.path
    if folder.router is not None:
        return True
    vocabulary = [path / "vocab.txt", path / "vocab.json", *path.glob("*.model")]
    return bool(folder.pickled or folder.head_pickles) or (
        not (path / "tokenizer.json").is_file() and any(file.is_file() for file in vocabulary)
    )


def convert(
    source: Path,
    target: Path,
    progress: Progress,
    adapter: Path | None = None,
    complete_with: Callable[[Path], object] = lambda _: None,
) -> ModelFolder:
    """Write the converted model of the folder `source` to the new folder `target`, and return it.

    With an `adapter`, write the model with its weights. `complete_with(folder)` checks or completes the new folder.

    An interrupted conversion leaves nothing with the name `target`. If two processes write the same folder, the first
    one that is complete counts. Raises `UsageError` for a model that cannot be converted, `NotReadyError` for a full or
    read-only disk, and if the conversion takes too long or too much memory.
    """
    folder = ModelFolder(source)
    total = folder.bytes + sum(file.stat().st_size for file in folder.pickled)
    try:
        with partial_folder(target) as partial:
            _check_space(target.parent, total)
            _run(source, partial, total, progress, adapter)
            complete_with(partial)
            complete(partial, target)
            progress(total, total)
    except OSError as error:
        raise NotReadyError(
            f"{target} cannot be written: {(error.strerror or str(error)).lower()}",
            "name a folder on a disk that is writable and has space",
        ) from None
    return model_folder.find(str(target))


def _check_space(folder: Path, needed_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed_bytes:
        raise NotReadyError(
            f"the disk is too full: the conversion needs {size(needed_bytes)}, and {folder} has {size(free)}",
            "free disk space, or name a folder on another disk",
        )


def _run(source: Path, partial: Path, total: int, progress: Progress, adapter: Path | None) -> None:
    """Run the process, and report the bytes that it has written. Raises its error."""
    # `-P`: the current folder, which may be the model's, is not searched for modules.
    folders = [str(source.resolve()), str(partial.resolve())]
    command = [sys.executable, "-P", "-m", _PROGRAM, *folders, str(os.getpid()), *([str(adapter)] if adapter else [])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    limit_s = _START_S + total / _BYTES_PER_S
    written = 0

    def on_wait(seconds: float) -> None:
        nonlocal written
        if seconds > limit_s:
            raise NotReadyError(
                f"the conversion of {source} did not end within {limit_s:.0f} s", "convert it on a faster disk"
            )
        written = max(written, _written(partial))
        progress(min(written, max(0, total - 1)), total)

    code, stdout, stderr = own_process.run(command, on_wait, environment=os.environ | offline)
    if code:
        raise _error(source, code, stdout, stderr)


def _written(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*"))
    except OSError:  # a temporary file that was removed
        return 0


def _error(source: Path, code: int, stdout: bytes, lines: list[str]) -> InferctlError:
    """Return the error that the process wrote to stdout, or how it ended."""
    if stdout:
        found = json.loads(stdout)
        kind = UsageError if found["exit_code"] == UsageError.exit_code else NotReadyError
        return kind(found["message"], found["hint"])
    how = f"signal {-code}" if code < 0 else lines[-1] if lines else f"exit code {code}"
    return NotReadyError(
        f"the conversion of {source} failed: {how}",
        "if the machine is out of memory, convert the model on a larger one",
    )
