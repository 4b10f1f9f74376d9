"""Brings a model to this machine for the verbs that need its weights, with the progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from inferctl.cli import console

if TYPE_CHECKING:
    from inferctl.hub import Progress
    from inferctl.model import ModelFolder


def fetch(source: str, revision: str | None) -> ModelFolder:
    """The model `source`: a folder, a model in the hub's cache, or downloaded into it. Raises as `hub.fetch` does."""
    from inferctl import hub

    with _shown(source) as progress:
        return hub.fetch(source, revision, progress)


@contextmanager
def _shown(source: str) -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; nothing if no download starts."""
    from inferctl import hub

    if not sys.stderr.isatty():
        yield hub.Lines(source, console.note)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.rich(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"downloading {source}", total=None, visible=False)
        yield lambda done, total: bars.update(bar, completed=done, total=total, visible=True)
        started = bars.tasks[bar].total is not None
    if started:
        console.note(f"downloaded {source}")
