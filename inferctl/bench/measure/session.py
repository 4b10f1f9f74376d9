"""One server under measurement: puts loads on it, one after the other, and gives the exact records of each with what the machine did."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.bench import privacy
from inferctl.bench.judge import summary
from inferctl.bench.load import child_server, generator, procfs, target
from inferctl.bench.measure import telemetry
from inferctl.bench.measure.outcome import Measurement
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Load, Run
from inferctl.errors import NotReadyError

_SCRATCH = ("bodies.jsonl", "order.bin", "schedule.bin", "warmup_schedule.bin")
Tell = Callable[..., None]


@dataclass(frozen=True)
class Session:
    """A server that answers at `aim`; `child` when it is ours. `watch` saw the machine before it started."""

    aim: target.Target
    child: child_server.ChildServer | None
    watch: telemetry.Watch
    tell: Tell

    @property
    def here(self) -> bool:
        """Whether it shares this machine with the load generator."""
        return self.child is not None or target.is_local(self.aim.url)

    def measure(
        self,
        load: Load,
        work: workload.Workload,
        run: Run,
        folder: Path,
        check: Callable[[], None] = lambda: None,
    ) -> Measurement:
        """Put one load on the server; records and logs go into `folder`. `check` is called twice a second and may raise to end it."""
        # Of no seed: a server that lives through several benches must not see an input again. Even (warm-up takes the next
        # number) and always six digits, so that all runs have inputs of one length.
        serial = 100_000 + 2 * secrets.randbelow(450_000)
        description = generator.prepare(load, work, self.aim, serial, folder)
        watched = self.child.process.pid if self.child else target.local_pid(self.aim.url)
        self.watch.ours |= {watched} if watched else set()

        def alive() -> None:
            if self.child:
                self.child.check()
            check()

        with procfs.Sampler({"server": watched} if watched else {}) as sampler:
            try:
                done = generator.run(
                    load,
                    description,
                    lambda live: self.tell(live.phase, 0.0, live),
                    alive,
                    self.aim.access.headers,
                )
            finally:
                for scratch in _SCRATCH:
                    (folder / scratch).unlink(missing_ok=True)
        start, end = done.state["measure_start_ns"], done.state["measure_end_ns"]
        resources = sampler.between(start, end)
        if watched is None and target.is_local(self.aim.url):
            # What the measured server itself used cannot be told from what others did.
            resources.pop("other_cores", None)
        if (client := summary.client_cpu_percent(done.state)) is not None:
            resources["client_cpu_percent"] = client
            if "other_cores" in resources:
                resources["other_cores"] = round(
                    max(0.0, resources["other_cores"] - (generator.cores_used(done.state) or 0)), 3
                )
        offered = len(work.schedule_ns) if load.mode == "open" else None
        return Measurement(
            run=run,
            started=0.0,
            part=summary.Part(done.rows, start, end, load.inputs_per_request, offered),
            state=done.state,
            resources=resources,
            folder=folder,
            info=self.aim.info,
            serial=serial,
            telemetry=self.watch.window(start, end, self.aim.info, here=self.here, ours=self.child is not None),
            load=load.model_dump(mode="json"),
            pace=self._pace(),
        )

    def _pace(self) -> dict[str, Any] | None:
        """What the server has learnt of its own speed by now: seconds a batch, tokens a second; None where it does not say."""
        if "pace" not in self.aim.info:
            return None
        with contextlib.suppress(NotReadyError):
            said: dict[str, Any] | None = target.connect(self.aim.url, access=self.aim.access).info.get("pace")
            return said
        return None


def describe(work: workload.Workload, load: Load, corpus: str, seed: int) -> dict[str, Any]:
    """What was sent, so that two runs can be told to have done the same work."""
    return {
        "sha256": work.digest,
        "corpus": privacy.name_of(corpus),
        "corpus_sha256": work.corpus_sha256,
        "seed": seed,
        "inputs": load.inputs,
    }
