"""Find the users of the targets with `users: auto`, with short closed loops (`concurrency.find`)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from inferctl.bench.measure import closed_loop, concurrency
from inferctl.bench.measure.bench import Bench, NotifyProgress, Progress, ready_server
from inferctl.bench.measure.concurrency import Concurrency
from inferctl.bench.measure.outcome import BenchTarget, Outcome
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.shape import Load
from inferctl.core.errors import InferctlError


def find(bench: Bench, outcomes: Mapping[str, Outcome], notify: NotifyProgress) -> dict[str, Concurrency]:
    """Return the concurrency of each target with `users: auto`; those with equal loads and texts get equal users.

    Servers that emulate their precision receive the users of the others: without these, they are searched too. A target
    that fails gets its `failure` in `outcomes`.
    """
    wanted = [target for target in bench.targets if bench.load_of(target).auto_users and not bench.plan.search]
    found: dict[str, Concurrency] = {}
    groups: dict[tuple[str, str], list[BenchTarget]] = {}
    for target in wanted:
        groups.setdefault((bench.load_of(target).model_dump_json(), bench.corpus_of(target)), []).append(target)
    for group in groups.values():
        searched: dict[str, Concurrency | None] = {}
        for emulated in (False, True):
            for target in group:
                try:
                    searched[target.name] = _find_one(bench, target, notify, emulated)
                except InferctlError as error:
                    outcomes[target.name].failure = error.message
            group = [target for target in group if target.name in searched]
            if any(searched.values()):
                found |= zip(searched, concurrency.shared(list(searched.values())), strict=True)
                break
    return found


def _find_one(bench: Bench, target: BenchTarget, notify: NotifyProgress, emulated: bool) -> Concurrency | None:
    """Send short closed loops to one target, with more and more users.

    Return None for a server that emulates its precision, unless `emulated`.
    """
    folder = bench.output / "runs" / f"{target.name}-users"
    folder.mkdir(parents=True, exist_ok=True)
    load, corpus, total = bench.load_of(target), bench.corpus_of(target), len(bench.order)
    step_name = "starting"

    def notify_phase(phase: str, *details: Any, **more: Any) -> None:
        notify(Progress(target.name, 0, total, f"finding users: {step_name}", *details, **more))

    with ready_server(bench, target, folder, notify_phase) as server:
        if server.connection.emulated and not emulated:
            return None

        def measure(users: int, seconds: float) -> concurrency.Step:
            nonlocal step_name
            step_name = str(users)
            place = folder / f"{users:05d}"
            work = workload.draw(_step_load(load, users, seconds), corpus, bench.plan.seed)
            measurement = server.measure(work, Run(target.name, 0), place)
            shutil.rmtree(place, ignore_errors=True)
            return concurrency.Step(
                users,
                round(closed_loop.weighted_rate(measurement.records), 3),
                measurement.resources.get("client_cpu_percent"),
                measurement.summary["rejected_percent"],
            )

        found = concurrency.find(measure)
        gain = "no further gain seen" if found.saturated else f"limited by the {found.limited_by}"
        notify_phase("found", done=f"users: {found.users} ({gain})")
        return found


def _step_load(load: Load, users: int, seconds: float) -> Load:
    """Return the closed loop of one step. The first step has the warm-up of the plan."""
    return load.as_single_stage(
        users=users,
        duration_s=seconds,
        warmup_s=load.warmup_s if users == concurrency.FIRST_USERS else seconds,
        window_s=min(load.window_s, concurrency.WINDOW_S),
    )
