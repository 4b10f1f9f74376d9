"""Download and convert a model for the commands that need its weights, with progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from inferctl.cli import build_view, console
from inferctl.models import hub, image_source
from inferctl.models import model as model_folder
from inferctl.models.model import ModelFolder
from inferctl.models.weights_folders import WeightsFolder, find


def fetch(source: str, revision: str | None) -> ModelFolder:
    """Return the folder of the model `source`, after a download from its hub or registry if the cache lacks it.

    Raises `UsageError` if the model does not exist, `NotReadyError` if the hub or the registry cannot be reached.
    """
    if image_source.is_image(source):
        return hub.cached(source, revision) or model_folder.find(str(pull_image(source)))
    with shown(source) as progress, shown(source, "convert") as convert_progress:
        return hub.fetch(source, revision, progress, convert_progress)


def weights(folder: WeightsFolder) -> ModelFolder:
    """Return the local folder of a model or an adapter, after a download if the cache lacks it."""
    if folder.base is None:
        return fetch(folder.source, folder.revision)
    if image_source.is_image(folder.source):
        pull_image(folder.source)
    elif model_folder.is_hub_id(folder.source) and not model_folder.snapshot(folder.source, folder.revision):
        with shown(folder.source) as progress:
            hub.download(folder.source, folder.revision, progress)
    return find(folder)


def pull_image(source: str) -> Path:
    """Return the folder of the model image `source` in the cache, pulled if it is not there."""
    from inferctl.image import model_transfer

    return build_view.follow(model_transfer.fetch(source))


@contextmanager
def shown(source: str, verb: str = "download") -> Iterator[hub.Progress]:
    """Show a progress bar, or lines without a terminal. Shows nothing if the work that `verb` names does not start."""
    if not sys.stderr.isatty():
        yield hub.Lines(source, console.note, verb)
        return

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.rich(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"{verb}ing {source}", total=None, visible=False)
        yield lambda done, total: bars.update(bar, completed=done, total=total, visible=True)
        started = bars.tasks[bar].total is not None
    if started:
        console.note(f"{verb}ed {source}")
