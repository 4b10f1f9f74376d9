"""Converts a model whose weights are pickles, or that has no `tokenizer.json`, to a folder that can be served.

`python -m inferctl.models.conversion` does the work in a process of its own, with bounded memory and time. The new
folder gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.core.partials import complete, partial_folder
from inferctl.core.sizes import size
from inferctl.models import model as model_folder
from inferctl.models.model import ModelFolder

# Called with the written bytes, and the bytes to write, estimated.
Progress = Callable[[int, int], None]

# The slowest import of torch and transformers took 40 s, on two cores with other load. Weights are read, written and
# hashed at this rate at least.
_START_S, _BYTES_PER_S = 300, 10_000_000
_POLL_S = 0.5
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


def convert(source: Path, target: Path, progress: Progress) -> ModelFolder:
    """Write the converted model of the folder `source` to the new folder `target`, and return it.

    An interrupted conversion leaves nothing with the name `target`. If two processes write the same folder, the first
    one that is complete counts. Raises `UsageError` for a model that cannot be converted, `NotReadyError` for a full or
    read-only disk, and if the conversion takes too long or too much memory.
    """
    folder = ModelFolder(source)
    total = folder.bytes + sum(file.stat().st_size for file in folder.pickled)
    with new_folder(target, total, "conversion") as partial:
        run(_PROGRAM, "conversion", source, partial, total, progress)
    return model_folder.find(str(target))


@contextlib.contextmanager
def new_folder(target: Path, total: int, work: str) -> Iterator[Path]:
    """Yield a folder for a model of `total` bytes, which gets the name `target` at the end. `work`: for messages.

    Raises `NotReadyError` for a full or read-only disk.
    """
    try:
        with partial_folder(target) as partial:
            if (free := shutil.disk_usage(target.parent).free) < total:
                raise NotReadyError(
                    f"the disk is too full: the {work} needs {size(total)}, and {target.parent} has {size(free)}",
                    "free disk space, or name a folder on another disk",
                )
            yield partial
            complete(partial, target)
    except OSError as error:
        raise NotReadyError(
            f"{target} cannot be written: {(error.strerror or str(error)).lower()}",
            "name a folder on a disk that is writable and has space",
        ) from None


def run(program: str, work: str, source: Path, partial: Path, total: int, progress: Progress, *arguments: str) -> None:
    """Run a process that writes a model, and report the bytes that it has written. Raises its error."""
    # `-P`: the current folder, which may be the model's, is not searched for modules.
    folders = [str(source.resolve()), str(partial.resolve())]
    command = [sys.executable, "-P", "-m", program, *folders, str(os.getpid()), *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    limit_s = _START_S + total / _BYTES_PER_S
    deadline = time.monotonic() + limit_s
    written = 0
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | offline,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                written = max(written, _written(partial))
                progress(min(written, max(0, total - 1)), total)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                if time.monotonic() > deadline:
                    raise NotReadyError(
                        f"the {work} of {source} did not end within {limit_s:.0f} s", "use a faster disk"
                    )
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            stdout.seek(0)
            stderr.seek(0)
            last = stderr.read()[-4000:].decode(errors="replace")
            raise _error(f"the {work} of {source}", process.returncode, stdout.read(), last)
    progress(total, total)


def _written(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*"))
    except OSError:  # a temporary file that was removed
        return 0


def _error(work: str, code: int, stdout: bytes, stderr: str) -> InferctlError:
    """Return the error that the process wrote to stdout, or how it ended."""
    if stdout:
        found = json.loads(stdout)
        kind = UsageError if found["exit_code"] == UsageError.exit_code else NotReadyError
        return kind(found["message"], found["hint"])
    lines = [line for line in stderr.splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else lines[-1] if lines else f"exit code {code}"
    return NotReadyError(
        f"{work} failed: {how}",
        "if the machine is out of memory, use a larger one",
    )
