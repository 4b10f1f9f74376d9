"""The profile of an engine: where its time goes, by the program `inferctl.serve.engines.profile`."""

from __future__ import annotations

from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.measured_server import NotifyPhase
from inferctl.bench.measure.outcome import Outcome
from inferctl.bench.plan import workload
from inferctl.core.errors import NotReadyError
from inferctl.models import reference_process
from inferctl.receipts.receipt import JsonObject

PROGRAM = "inferctl.serve.engines.profile"
_GRID = [(count, tokens) for tokens in (16, 64, 256) for count in (1, 8, 64, 512)]
_TEXTS = 64  # of the workload


def measure(bench: Bench, outcome: Outcome, notify: NotifyPhase) -> JsonObject:
    """Return the profile of a target that inferctl starts. Raises `InferctlError` if its process fails."""
    assert bench.model is not None
    target = outcome.target
    if (device := outcome.info["device"])["kind"] != "cpu":
        raise NotReadyError(f"cannot profile the engine on {device['name']}", "use `--profile` on a CPU")
    limit = {"max_batch_tokens": target.max_batch_tokens} if target.max_batch_tokens else {}
    texts = workload.read_corpus(bench.corpus_of(target))[0]
    wanted = {
        "engine": {"task": bench.plan.load.task, "precision": target.precision, **limit},
        "words": " ".join(texts)[:100_000],
        "grid": _GRID,
        "texts": texts[:_TEXTS],
    }
    return reference_process.run(
        bench.model, wanted, (), lambda passed: notify("profiling the engine", passed), program=PROGRAM
    )
