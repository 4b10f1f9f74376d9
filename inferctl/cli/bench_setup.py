"""Prepare a benchmark from the options of `inferctl bench`.

Every check that needs no server runs here. Nothing is started.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from inferctl.bench import privacy
from inferctl.bench.load import child_server
from inferctl.bench.load.http_json import ServerAccess
from inferctl.bench.load.target import ServerConnection, connect
from inferctl.bench.measure.bench import Bench, rerank_server
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import collection
from inferctl.bench.plan import plan as plans
from inferctl.bench.plan.plan import Plan
from inferctl.cli import bench_checks, console, download, options
from inferctl.cli.bench_options import AccessOptions, BenchOptions, parse_target
from inferctl.config import spec
from inferctl.config.settings import Resolved
from inferctl.config.spec import Task
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models import hub
from inferctl.models import model as model_folder


def prepare(bench_options: BenchOptions) -> Bench:
    """Return a benchmark in a folder of its own. Raises `UsageError` and `NotReadyError`."""
    url_targets = [parse_target(text) for text in bench_options.urls]
    if bench_options.access != AccessOptions() and not url_targets:
        raise UsageError(
            "`--header`, `--api-key-env` and `--served-model` apply only to the servers of `--url`",
            "add a server: `--url NAME=URL`",
        )
    access = bench_options.access.access()
    resolved = _settings(bench_options, needed=not url_targets or bool(bench_options.precisions))
    name = "precision" if bench_options.plan is None else bench_options.plan
    plan = plans.read_plan(name)
    if not bench_options.precisions:
        bench_checks.check_configurations(plan, running_servers=bool(url_targets))
    plan = plan.with_overrides(bench_options.precisions, **bench_options.overrides)
    plan = plan.with_bounds(resolved.spec.slo.ttft_ms, resolved.spec.slo.itl_ms) if resolved else plan
    if bench_options.overrides.get("users") is not None and plan.load.mode == "open" and not plan.load.capacity_percent:
        rate = f"{plan.load.rate:g} requests/s" if plan.load.rate else "the rates of its stages"
        console.warn(
            f"`--users {bench_options.overrides['users']}` has no effect: this load is an open loop with {rate}"
        )
    targets = _targets(plan, url_targets, bench_options)
    judged = collection.read(bench_options.retrieval) if bench_options.retrieval else None
    needs_model = any(target.url is None for target in targets) or bool(bench_options.models)
    slo = bench_options.slo_p99_ms or (resolved.spec.slo.p99_ms if resolved else None)
    bench_checks.check_search(plan, targets, slo)
    bench_checks.check_corpora(plan, targets)
    # The download comes last, after every check that needs no model.
    folder = _model_folder(resolved, needs_model)
    servers = _servers(targets, access)
    plan = plan.for_task(_task(resolved, folder, targets, servers))
    if resolved and resolved.spec.models and needs_model and plan.load.names is None:
        plan = plan.model_copy(update={"load": plan.load.model_copy(update={"names": "uniform"})})
    if bench_options.profile and (
        plan.load.task == "generate" or folder is None or not any(each.precision for each in targets)
    ):
        raise UsageError(
            "`--profile` shows the engine of a server that inferctl starts with one model, without vLLM",
            "remove `--profile`, or measure a precision of an encoder: `-p bf16`",
        )
    if plan.load.task == "generate":
        # A plan may have other configurations for generation.
        targets = _targets(plan, url_targets, bench_options)
        bench_checks.check_search(plan, targets, slo)
        bench_checks.check_lengths(plan)
    plan = _with_names(plan, targets, lambda: _tasks(resolved, folder), servers)
    bench_checks.check_checkpoints(targets, folder)
    if judged and plan.load.task != "embed":
        raise UsageError(
            f"`--retrieval` measures embeddings, but the task of the model is {plan.load.task}",
            "add a reranker to a benchmark of embeddings: `--rerank MODEL`",
        )
    models = _models(folder, plan.load.task, bench_options)
    targets = _of_models(targets, models)
    rerank = bench_options.rerank
    if (rerank or bench_options.dimensions) and not judged:
        raise UsageError("`--rerank` and `--dimensions` need a collection", "add `--retrieval DIR`")
    if rerank and rerank.startswith(("http://", "https://")):
        rerank_server(rerank, access, targets)
    elif rerank:
        rerank = str(_rerank_folder(rerank))
    output = create_folder(bench_options.output, plan.name)
    command = None
    if resolved and (folder or resolved.spec.models):
        spec_file = Path(resolved.file).resolve() if resolved.file else None
        command = child_server.serve_command(str(folder) if folder else None, resolved.spec.name, spec_file)
    return Bench(
        plan,
        targets,
        command,
        folder,
        output,
        slo,
        access,
        profile=bench_options.profile,
        collection=judged,
        dimensions=list(dict.fromkeys(bench_options.dimensions)) or (256, 128),
        rerank=rerank,
        models=models,
        model_source=resolved.spec.model.source if resolved and resolved.spec.model else None,
        hardware_wanted=list(dict.fromkeys(resolved.spec.hardware)) if resolved else [],
    )


def _rerank_folder(source: str) -> Path:
    """Return the folder of a model that ranks documents. Raises `UsageError` for another model."""
    from inferctl.reading import model_summary  # with tokenizers, which no measured URL needs

    files = download.fetch(source, None)
    task = model_folder.resolve_task("auto", files, source)
    if task != "rerank" and (
        task != "embed" or "tokens" not in model_summary.read(task, files.path)["trained_outputs"]
    ):
        made = "a cross-encoder, or a model for embeddings with one vector per token"
        raise UsageError(f"`--rerank {source}` is a model for {task} that cannot rank documents", f"pass {made}")
    return files.path.resolve()


def _servers(targets: list[BenchTarget], access: ServerAccess) -> dict[str, ServerConnection]:
    """Return the servers of `--url` by the names of their targets. Sends requests to them."""
    return {target.name: connect(target.url, access=access) for target in targets if target.url}


def _task(
    resolved: Resolved | None, folder: Path | None, targets: list[BenchTarget], servers: dict[str, ServerConnection]
) -> Task:
    """Return the task of all targets. Raises `UsageError` if they differ, or if the model is made for another task."""
    tasks = {name: server.task for name, server in servers.items()}
    if resolved and len(servers) < len(targets):
        found = set(_tasks(resolved, folder).values())
        # The requests of a load with names have the task of their name.
        task = found.pop() if len(found) == 1 else "embed"
        tasks |= {target.name: task for target in targets if not target.url}
    if len(set(tasks.values())) > 1:
        named = ", ".join(f"{name}: {task}" for name, task in tasks.items())
        raise UsageError(f"the targets have different tasks: {named}", "measure each task in a benchmark of its own")
    return next(iter(tasks.values()), "embed")


def _tasks(resolved: Resolved | None, folder: Path | None) -> dict[str, Task]:
    """Return the task of each model and adapter in the settings. `folder`: of the model, if it is the only one."""
    found: dict[str, Task] = {}
    for one in resolved.spec.each() if resolved else ():
        files = model_folder.ModelFolder(folder) if folder else download.fetch(one.model.source, one.model.revision)
        task = model_folder.resolve_task(one.model.task, files, one.model.source)
        found |= dict.fromkeys([one.name, *(adapter.name for adapter in one.model.adapters)], task)
    return found


def _with_names(
    plan: Plan, targets: list[BenchTarget], of_spec: Callable[[], dict[str, Task]], servers: dict[str, ServerConnection]
) -> Plan:
    """Return the plan with the tasks of the names that requests use. `of_spec` returns those of the spec.

    Raises `UsageError` for a name that a target does not have, and for names of generation and of other tasks.
    """
    if not any(plan.load_with(target.load).names for target in targets):
        return plan
    served = {target.name: servers[target.name].tasks() if target.url else of_spec() for target in targets}
    load = plan.load.with_names(served[targets[0].name])
    plan = plan.model_copy(update={"load": load})
    loads = [plan.load_with(target.load).with_names(served[target.name]) for target in targets]
    tasks = {each.of_name(name).task for each in loads for name in each.names or ()}
    if "generate" in tasks and len(tasks) > 1:
        raise UsageError("a load cannot name models of generation and of other tasks", "measure one after the other")
    task = tasks.pop() if len(tasks) == 1 else "embed"
    return plan.model_copy(update={"load": load.model_copy(update={"task": task})})


def _settings(bench_options: BenchOptions, needed: bool) -> Resolved | None:
    """Return the settings; None if only running servers are measured and no model is specified."""
    try:
        return options.load(
            bench_options.spec_file, {"model.source": next(iter(bench_options.models), None)}, several=True
        )
    except UsageError:
        if needed or bench_options.spec_file or bench_options.models or Path(spec.DEFAULT_FILE).exists():
            raise
        return None


def _targets(plan: Plan, url_targets: list[tuple[str, str]], bench_options: BenchOptions) -> list[BenchTarget]:
    """Return what the benchmark measures.

    Without `--url`, these are the plan's configurations. With `--url`, these are the named servers, and also the
    configurations of `--precision`. Raises `UsageError` for two equal names.
    """
    configurations = plan.configurations if bench_options.precisions or not url_targets else []
    started = [
        BenchTarget(each.name, each.precision, None, each.max_batch_tokens, each.corpus, each.load, each.checkpoint)
        for each in configurations
    ]
    if url_targets and not started and bench_options.overrides.get("batch_tokens"):
        raise UsageError(
            "`--batch-tokens` cannot change the running servers of `--url`",
            "start that server with `--max-batch-tokens`, or add `--precision` to measure a new server too",
        )
    corpora = list(dict.fromkeys(bench_options.overrides.get("corpora") or []))
    targets = started + [
        BenchTarget(f"{name}-{Path(corpus).stem}" if corpus else name, url=address, corpus=corpus)
        for name, address in url_targets
        for corpus in (corpora if len(corpora) > 1 else [None])
    ]
    names = [target.name for target in targets]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"two servers or configurations have the name {sorted(repeated)[0]!r}",
            "give each server a name of its own: `--url NAME=URL`",
        )
    return targets


def _models(first: Path | None, task: Task, bench_options: BenchOptions) -> dict[str, Path]:
    """Return the folders of several `--model` by source; empty for one. Raises `UsageError` if their tasks differ."""
    if first is None or len(bench_options.models) < 2:
        return {}
    found = {bench_options.models[0]: first}
    for source in bench_options.models[1:]:
        files = download.fetch(source, None)
        if (other := model_folder.resolve_task("auto", files, source)) != task:
            raise UsageError(f"the models have different tasks: {task} and {other} ({source})", "measure one task")
        found[source] = files.path.resolve()
    return found


def _of_models(targets: list[BenchTarget], sources: Iterable[str]) -> list[BenchTarget]:
    """Return each server to start for each of several models. Raises `UsageError` for equal names."""
    names = {source: re.sub(r"[^A-Za-z0-9._-]", "-", privacy.name_of(source)) for source in sources}
    if len({*names.values()}) < len(names):
        raise UsageError(f"two models have the name {next(iter(names.values()))!r}", "rename one of their folders")
    return [
        replace(target, name=f"{names[source]}-{target.name}", model=source)
        for source in names
        for target in targets
        if not target.url
    ] + [target for target in targets if target.url or not names]


def create_folder(parent: Path, name: str) -> Path:
    """Create and return `parent/name-TIME`, with `-2`, `-3`, ... at its end if the name exists."""
    first = (parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    for folder in itertools.chain([first], numbered):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            raise NotReadyError(f"{folder.parent} is a file, not a folder", "pass another `--output DIR`") from None
        except OSError as error:
            raise NotReadyError(f"cannot create {folder}: {error.strerror}", "pass another `--output DIR`") from None
        return folder
    raise AssertionError("unreachable")


def _model_folder(resolved: Resolved | None, needed: bool) -> Path | None:
    """Return the local model folder, after a download if it is `needed`.

    None if only running servers are measured and the model is not on this machine. Quality is then not checked.
    """
    if resolved is None or resolved.spec.models:
        return None
    source, revision = resolved.spec.model.source, resolved.spec.model.revision
    folder = download.fetch(source, revision) if needed else hub.cached(source, revision)
    return folder.path.resolve() if folder else None
