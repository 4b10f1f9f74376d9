"""Runs a program in a process of its own, which is killed if nobody waits for it any more."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

_POLL_S = 0.5


def run(
    command: Sequence[str],
    on_wait: Callable[[float], None],
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> tuple[int, bytes, list[str]]:
    """Return the exit code, stdout, and the lines of stderr that are not blank. `on_wait` gets the seconds so far.

    If `on_wait` raises, the program is killed.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        began = time.monotonic()
        try:
            while process.poll() is None:
                on_wait(time.monotonic() - began)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").splitlines()
        return process.returncode, stdout.read(), [line for line in lines if line.strip()]
