"""Starts the server of a spec: downloads its models, and selects the server of their task."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inferctl.config.spec import Spec, Task
from inferctl.core import core_files, outputs
from inferctl.core.errors import UsageError
from inferctl.models import adapter, hub, model
from inferctl.models.model import ModelFolder
from inferctl.serve import event_loop
from inferctl.serve.observe import logs
from inferctl.serve.observe.progress import Spinner, StartProgress
from inferctl.serve.options import ServerOptions
from inferctl.serve.signals import StopSignals

if TYPE_CHECKING:
    from inferctl.serve.lifetime import ServerLifetime


def run(
    spec: Spec,
    options: ServerOptions,
    notify: Callable[[str], None],
    fetch: hub.Fetch | None = None,
    spinner: Spinner | None = None,
) -> int:
    """Serve until a signal arrives, and return the exit code. `notify` gets status lines.

    `fetch` downloads a model. Without it, and with JSON logs, the download reports its progress as status lines.
    `spinner` shows the start on a terminal; else the start has status lines, too.
    Raises `UsageError` for a model that is not found or not usable, `NotReadyError` for such a port or device.
    """
    if options.log not in ("text", "json"):
        raise UsageError(f"unknown log style {options.log!r}", "`--log` accepts text or json")
    logs.configure(options.log)
    core_files.disable()
    # The library would start one thread per core, which compete with batches that have one core each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.log == "json":
        notify = logging.getLogger("inferctl.server").info
    if options.announce:
        outputs.retract(options.announce)
    loaded = [_load(one, notify, None if options.log == "json" else fetch) for one in spec.each()]
    tasks = [task for task, _ in loaded]
    if spec.models and "generate" in tasks:
        name = spec.models[tasks.index("generate")].name
        raise UsageError(
            f"models: {name} is of the task generate, and vLLM serves one model in each server",
            "serve it alone, with `model` in a spec of its own",
        )
    if len(spec.models) == 1:
        (spec,) = spec.each()
    with StopSignals() as signals:
        progress = StartProgress(notify, None if options.log == "json" else spinner)
        what = [f"{one.name} for the task {task}" for one, (task, _) in zip(spec.each(), loaded, strict=True)]
        progress.phase(f"loading {', '.join(what)}")
        try:
            server = _server(spec, loaded, options, notify, progress, signals)
            with event_loop.runner() as runner:
                return runner.run(server.run(signals))
        finally:
            progress.stop()


def _load(spec: Spec, notify: Callable[[str], None], fetch: hub.Fetch | None) -> tuple[Task, ModelFolder]:
    """Return the task and the folder of one model, which `fetch` downloads."""
    source, revision = spec.model.source, spec.model.revision
    if fetch is None:
        folder = hub.fetch(source, revision, hub.Lines(source, notify), hub.Lines(source, notify, "convert"))
    else:
        folder = fetch(source, revision)
    return model.resolve_task(spec.model.task, folder, source), folder


def _server(
    spec: Spec,
    loaded: Sequence[tuple[Task, ModelFolder]],
    options: ServerOptions,
    notify: Callable[[str], None],
    progress: StartProgress,
    signals: StopSignals,
) -> ServerLifetime:
    """Return the server. Raises `KeyboardInterrupt` for a signal during the imports, which take seconds."""
    task, folder = loaded[0]
    if task == "generate":
        from inferctl.serve.generate.generation_server import GenerationServer

        signals.check()
        adapters = hub.fetch_adapters(spec.model.adapters, folder, lambda source: hub.Lines(source, notify))
        return GenerationServer(spec, options, notify, folder, adapters, progress, signals)
    if wrong := [(one, of) for one, (of, _) in zip(spec.each(), loaded, strict=True) if one.model.adapters]:
        raise UsageError(f"{wrong[0][0].name}: the task {wrong[0][1]} has no adapters", adapter.MERGE)
    from inferctl.serve.encoder_server import EncoderServer

    signals.check()
    return EncoderServer(spec, loaded, options, notify, progress)
