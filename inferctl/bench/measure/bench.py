"""The settings of a benchmark, its progress, and the start of its servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from inferctl.bench.load import child_server, load_run
from inferctl.bench.load.http_json import ServerAccess
from inferctl.bench.load.server_tokenizer import of_server
from inferctl.bench.load.target import ServerConnection, connect
from inferctl.bench.measure.concurrency import Concurrency
from inferctl.bench.measure.environment import Environment, detect
from inferctl.bench.measure.measured_server import MeasuredServer, NotifyPhase
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.measure.sensors import MachineMonitor
from inferctl.bench.plan import tokens
from inferctl.bench.plan.collection import Collection
from inferctl.bench.plan.plan import Plan, Run
from inferctl.bench.plan.shape import Load
from inferctl.bench.plan.tokens import Tokenizer
from inferctl.config import settings
from inferctl.core.errors import InferctlError


@dataclass(frozen=True)
class Progress:
    """The state of a benchmark at one moment.

    `number` is the run of `total` (0 if it is not a run), `seconds` the time in this phase. `live` has figures while a
    load runs. `done` is a line on what has ended.
    """

    name: str
    number: int
    total: int
    phase: str
    seconds: float = 0.0
    live: load_run.LoadProgress | None = None
    done: str | None = None


NotifyProgress = Callable[[Progress], None]


def phase_notifier(notify: NotifyProgress, name: str, number: int, total: int) -> NotifyPhase:
    """Return a function that reports the phases of one run to `notify`."""
    return lambda phase, *details, **more: notify(Progress(name, number, total, phase, *details, **more))


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark.

    - `command`: returns the command that starts a server; None if all targets run already.
    - `model`: the model folder for the quality check. Without it, vectors are not checked.
    - `models`: the folders of several models, by source.
    - `slo_p99_ms`: the SLO of a search, if the plan has none.
    - `access`: headers and keys for running servers.
    - `users`: the concurrency found for each target with `users: auto`, by name.
    - `tokenizer`: counts the tokens of prompts for generation; None if there is none. One for all targets, so that all
      receive the same prompts.
    - `environment`: this machine.
    - `profile`: whether the engine of each target is profiled after its first run.
    - `collection`: what the servers search, after the first run of each; None for no retrieval. `dimensions`: to which
      vectors are also truncated. `rerank`: the URL or the folder of what ranks the best documents again.
    - `model_source`, `hardware_wanted`: the source of the weights and the catalog keys of the hardware in the spec.
    """

    plan: Plan
    targets: Sequence[BenchTarget]
    command: child_server.ServeCommand | None
    model: Path | None
    output: Path
    slo_p99_ms: float | None = None
    access: ServerAccess = field(default_factory=ServerAccess)
    users: Mapping[str, Concurrency] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    environment: Environment = field(default_factory=detect)
    profile: bool = False
    collection: Collection | None = None
    dimensions: Sequence[int] = ()
    rerank: str | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    model_source: str | None = None
    hardware_wanted: Sequence[str] = ()

    @property
    def order(self) -> list[Run]:
        """All runs, in their order."""
        return self.plan.runs([target.name for target in self.targets])

    @property
    def search_s(self) -> float | None:
        """The seconds of one search: an equal share of the budget for each target; None without a budget."""
        budget = self.plan.search.budget_s if self.plan.search else None
        return None if budget is None else budget / len(self.targets)

    def load_of(self, target: BenchTarget) -> Load:
        """Return the load of a target, with the number of users that was found for it and the shares of names."""
        load = self.plan.load_with(target.load)
        load = load.with_names(load.tasks) if load.tasks else load
        found = self.users.get(target.name)
        return load.model_copy(update={"users": found.users}) if found and load.auto_users else load

    def folder_of(self, target: BenchTarget) -> str | None:
        """Return the folder of the model of a target; None for the benchmark's."""
        return str(self.models[target.model]) if target.model else None

    def corpus_of(self, target: BenchTarget) -> str:
        """Return the corpus of a target."""
        return target.corpus or self.plan.corpus


def find_tokenizer(bench: Bench) -> Tokenizer | None:
    """Return the tokenizer for prompts of generation: that of the model folder, else of the first server that has one.

    None if there is none, or if the load is for another task.
    """
    if not bench.plan.load.generation:
        return None
    if found := tokens.of_model(bench.model):
        return found
    for target in bench.targets:
        with contextlib.suppress(InferctlError):
            if target.url and (server := of_server(connect(target.url, access=bench.access))):
                return server
    return None


@contextlib.contextmanager
def ready_server(bench: Bench, target: BenchTarget, folder: Path, notify: NotifyPhase) -> Iterator[MeasuredServer]:
    """Yield the server of a target, ready for a load. A server that inferctl starts ends with the block.

    Raises `InferctlError` if it does not start or does not respond.
    """
    with contextlib.ExitStack() as stack:
        # The monitor starts first, so that its first sample shows the processes that were on a GPU before.
        monitor = stack.enter_context(MachineMonitor())
        child = None if target.url else stack.enter_context(started_server(bench, target, folder, notify))
        connection = child.connection if child else connect(target.url or "", access=bench.access)
        yield MeasuredServer(connection.of_names(bench.load_of(target).names or ()), child, monitor, notify)


def started_server(
    bench: Bench, target: BenchTarget, folder: Path, notify: NotifyPhase
) -> contextlib.AbstractContextManager[child_server.ChildServer]:
    """Return a context with a server of a target, started in `folder`.

    If its load has a closed loop, which looks for its capacity, the server rejects no request. Other loads show how it
    behaves with its own limits.
    """
    if bench.command is None or target.precision is None:
        raise InferctlError(f"{target.name} has neither a URL nor a precision")
    announce = folder / "announce.json"
    arguments = [*bench.command(target.precision, announce, target.checkpoint or bench.folder_of(target))]
    if target.max_batch_tokens:
        arguments += ["--max-batch-tokens", str(target.max_batch_tokens)]
    load = bench.load_of(target)
    has_closed_loop = not bench.plan.search and (load.mode == "closed" or load.capacity_percent is not None)
    variables = settings.WITHOUT_ADMISSION if has_closed_loop else {}
    return child_server.serve(arguments, announce, folder, lambda passed: notify("starting", passed), variables)


def rerank_server(url: str, access: ServerAccess, targets: Sequence[BenchTarget]) -> ServerConnection:
    """Return the server of a URL that ranks documents. Headers and keys are sent only to an origin of the targets.

    Raises `InferctlError` if it does not rank.
    """
    known = {urlsplit(target.url)[:2] for target in targets if target.url}
    server = connect(url, access=ServerAccess(access.headers if urlsplit(url)[:2] in known else {}))
    # A model with one vector per token serves both tasks.
    name = next((name for name, task in server.tasks().items() if task == "rerank"), server.model)
    server = server.of_name(name, "rerank")
    server.rerank(["ready", "ready"])
    return server


@contextlib.contextmanager
def reranker(bench: Bench, folder: Path, notify: NotifyPhase) -> Iterator[ServerConnection]:
    """Yield the server that ranks documents again: that of a URL, or one that inferctl starts in `folder`."""
    assert bench.rerank
    if bench.rerank.startswith(("http://", "https://")):
        yield rerank_server(bench.rerank, bench.access, bench.targets)
        return
    folder.mkdir(parents=True, exist_ok=True)
    announce, starting = folder / "announce.json", partial(notify, "starting")
    arguments = child_server.serve_command(bench.rerank, "rerank", None)("auto", announce, None)
    with child_server.serve(arguments, announce, folder, starting, settings.WITHOUT_ADMISSION) as child:
        yield rerank_server(child.connection.url, bench.access, ())
