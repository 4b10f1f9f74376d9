"""Decide whether the figures of a run may be used. A reason makes it invalid; a caution is a warning next to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench import stats
from inferctl.bench.judge.summary import failures
from inferctl.config.spec import MOST_API_PROCESSES
from inferctl.receipts import noise, rejections, shares
from inferctl.receipts.receipt import JsonObject

CLIENT_CPU_LIMIT = 90.0
ACHIEVED_LIMIT = 0.98
LATE_LIMIT = 0.01
CACHED_LIMIT_PERCENT = 1.0
# An event loop, or engines, that were busy for a larger share of the time had none left.
BUSY_LIMIT = 90.0
# Of the time. More waiting for a core means that more processes would wait too.
WAITING_LIMIT = 10.0
_NEEDED_FOR_P90 = stats.needed(0.9)
_MORE_GENERATORS = "add load generators with `--workers`"
_SHARE = re.compile(r"(?:up to )?(\d+)%")
# What must be equal in all runs, and its path in the response of `GET /info`.
_IDENTITY = {
    "the model's sha256": ("model", "sha256"),
    "effective precision": ("precision", "effective"),
    "attention": ("attention",),
    "image": ("image", "digest"),
    "device": ("device", "name"),
}


@dataclass(frozen=True)
class Validity:
    """`reasons` why the figures are invalid (none: they are valid), and `cautions`: warnings about them."""

    reasons: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.reasons

    def labeled(self, label: str) -> Validity:
        """Return this validity with `label: ` before each reason and caution."""
        return Validity(*(tuple(f"{label}: {text}" for text in texts) for texts in (self.reasons, self.cautions)))

    def as_dict(self) -> dict[str, Any]:
        return {"valid": self.valid, "reasons": list(self.reasons), "cautions": list(self.cautions)}


def judge(
    summary: JsonObject,
    resources: Mapping[str, float],
    state: JsonObject,
    cores: int,
    searched: bool = False,
) -> Validity:
    """Return the validity of one run by its summary, the resources used and the report of the load generator (`state`).

    All runs together are judged by the number of samples (`judge_samples`), and by rejected and failed requests
    (`judge_requests`). In a search (`searched`), it is a result and not an error if the server cannot complete a rate:
    this is then a caution.
    """
    reasons: list[str] = []
    cautions: list[str] = []
    of_server = cautions if searched else reasons
    client = resources.get("client_cpu_percent")
    if client is not None and client > CLIENT_CPU_LIMIT:
        reasons.append(
            f"the load generator used {client:.0f}% of its core (limit {CLIENT_CPU_LIMIT:.0f}%) "
            f"and was the bottleneck: {_MORE_GENERATORS}"
        )
    offered, answered = summary["offered"], summary["answered"]
    sent = summary["requests"] - summary["dropped"]
    late = bool(offered) and summary["late"] > LATE_LIMIT * sent
    # A rejection is a response in time. Failed requests are judged by the error budget.
    expected = (offered or 0) - summary.get("rejected", 0) - sum(failures(summary).values())
    if offered and answered < ACHIEVED_LIMIT * expected:
        (reasons if late else of_server).append(
            f"{answered} of {expected} offered requests were completed in time "
            f"({100 * answered / expected:.0f}%, limit {100 * ACHIEVED_LIMIT:.0f}%), because "
            + (f"the load generator was late: {_MORE_GENERATORS}" if late else "the server fell behind: lower the rate")
        )
    if dropped := summary["dropped"]:
        of_server.append(
            f"{dropped} of {summary['requests']} requests were dropped, because too many were in flight: lower the rate"
        )
    if restarts := resources.get("engine_restarts"):
        of_server.append(f"engines crashed and restarted in the measured window ({restarts:.0f}): see the server's log")
    if late:
        cautions.append(
            f"the load generator sent {summary['late']} of {sent} requests over 1 ms late "
            f"({100 * summary['late'] / sent:.1f}%), and latencies include this delay: {_MORE_GENERATORS}"
        )
    peak = state.get("cpu_peak_percent") or 0.0
    if peak > CLIENT_CPU_LIMIT and (client or 0.0) <= CLIENT_CPU_LIMIT:
        cautions.append(
            f"the load generator used {peak:.0f}% of its core in its busiest second, and latencies of that second "
            f"include its delays: {_MORE_GENERATORS}"
        )
    if not state.get("steady", True):
        cautions.append(
            "the warm-up did not settle, so the first requests may be slower than the others: "
            "raise `warmup_s` in the plan"
        )
    cautions += [
        f"{found.text}, which raises latencies: {found.action}" for found in noise.above_limits(resources, cores)
    ]
    return Validity(tuple(reasons), tuple(cautions))


def judge_front_end(resources: Mapping[str, float], info: JsonObject) -> Validity:
    """Return a warning if a run was limited by the backend or the API processes of the server, and not by the engines.

    Then an event loop or the threads that tokenize hardly slept, although the engines had time left. A server that does
    not report how busy its engines are (generation) is judged by the former. `info`: `GET /info` of the server.
    """
    engines = resources.get("engine_busy_percent")
    names = ("backend", "api", "tokenizer")
    name = next((name for name in names if resources.get(f"{name}_busy_percent", 0.0) > BUSY_LIMIT), None)
    if name is None or (engines is not None and engines > BUSY_LIMIT):
        return Validity()
    busy, waiting = resources[f"{name}_busy_percent"], resources[f"{name}_waiting_percent"]
    count = (info.get("api_processes") or {}).get("count") or 1
    processes = "the backend" if name == "backend" else "the API process" if count == 1 else f"{count} API processes"
    threads = "tokenizer threads" if name == "tokenizer" else "event loop"
    hint = "use a faster CPU or a second replica"
    if name != "backend" and "api_processes" in info and 2 * count <= MOST_API_PROCESSES:
        hint = f"set `serve.api_processes: {2 * count}`, with a core for each, or {hint}"
    figures = f"{busy:.0f}% of the time (limit {BUSY_LIMIT:.0f}%)"
    if waiting > WAITING_LIMIT:
        figures += f", {waiting:.0f}% waiting for a core"
        hint = "give the server more CPU cores, of its own if the load generator shares them"
    if engines is not None:
        figures += f", and the engines {engines:.0f}%"
    limited = f"the front end limited the server: the {threads} of {processes} had work {figures}: {hint}"
    return Validity(cautions=(limited,))


def judge_requests(summary: JsonObject, budget_percent: float, searched: bool = False) -> Validity:
    """Return the validity of a configuration by its requests without a good response.

    Rejected requests are a caution, or a reason by the rule of `rejections`. The true share of failed ones must be
    within the error budget. The configuration is invalid if they show that the share is over it. If they do not, but
    more failed than the budget allows, this is a caution.
    """
    found = _judge_failures(summary, budget_percent, searched)
    if not summary.get("rejected"):
        return found
    if reason := rejections.reason(summary):
        return Validity((reason, *found.reasons), found.cautions)
    share = shares.percent(summary["rejected"], summary["requests"])
    caution = (
        f"the server rejected {summary['rejected']} of {summary['requests']} requests (429, {share}), "
        "and latencies are those of accepted requests: lower the load"
    )
    return Validity(found.reasons, (caution, *found.cautions))


def _judge_failures(summary: JsonObject, budget_percent: float, searched: bool) -> Validity:
    kinds = failures(summary)
    if not kinds:
        return Validity()
    count, total = sum(kinds.values()), summary["requests"]
    counts = ", ".join(f"{name}: {number}" for name, number in kinds.items())
    message = f"{count} of {total} requests failed ({counts})"
    if count <= budget_percent / 100 * total or searched:
        return Validity(cautions=(f"{message}, and latencies are those of the others: see the log of the server",))
    message += f", {shares.percent(count, total)} with an error budget of {budget_percent:g}%"
    if shares.exceeds(count, total, budget_percent / 100):
        return Validity((f"{message}: see the log of the server",))
    return Validity(cautions=(f"{message}, in a sample too small to decide: use a longer `--duration`",))


def judge_generation(
    summary: JsonObject, common_prefix: float, unique: bool, approximate: str | None = None
) -> Validity:
    """Return the validity of a configuration by its prompts and streams.

    `unique`: each prompt has a cache-busting prefix, after a share `common_prefix` that all prompts have in common. A
    larger share from the server's cache makes the time to the first token too short. `approximate`: why the prompts do
    not have the lengths of the plan.
    """
    reasons, cautions = [], []
    cached, limit = summary["cached_percent"], 100 * common_prefix + CACHED_LIMIT_PERCENT
    if summary["tokens_per_request"] is None:
        cautions.append("the server reports no usage, so the tokens of the prompts are unknown")
    if cached is None:
        cautions.append(
            "the server does not report cached tokens, so it is unknown whether a prefix cache shortened the time to "
            "the first token: start vLLM with `--enable-prompt-tokens-details`, or restart the server before each "
            "benchmark"
        )
    elif unique and cached > limit:
        reasons.append(
            f"{cached:.1f}% of the prompts' tokens came from a prefix cache (limit {limit:g}%), so the time to the "
            "first token is too short: measure with longer prompts, with the path /v1/completions, or set "
            "`common_prefix` in the plan to the share that your prompts have in common"
        )
    if summary["counted_percent"] < 100:
        cautions.append(
            "the server does not report usage in each event, so each event counts as one token, and ITL is the gap "
            f"between events ({summary['tokens_per_event'] or 0:.2f} tokens per event on average)"
        )
    if approximate:
        cautions.append(f"the lengths of the prompts are approximate: {approximate}")
    total = sum(summary["finish"].values())
    if early := total - summary["finish"].get("length", 0):
        cautions.append(
            f"{early} of {total} responses ended before the requested length, so the lengths of the outputs depend on "
            "the model: compare TTFT, ITL and TPOT, not latencies"
        )
    return Validity(tuple(reasons), tuple(cautions))


def judge_samples(summary: JsonObject) -> Validity:
    """Return the validity by the number of samples, from the summary of all runs of a configuration.

    A closed loop is for throughput: its p99 is shown as a lower bound, and needs no warning.
    """
    n, p99 = summary["latency_ms"]["n"], summary["latency_ms"]["p99"]
    if n < _NEEDED_FOR_P90:
        return Validity((f"{n} of the {_NEEDED_FOR_P90} responses that a p90 needs: use a longer `--duration`",))
    if summary["offered"] is None:
        return Validity()
    if p99["value"] is None:
        return Validity(cautions=(f"{n} of the {p99['needed']} responses that a p99 needs: use a longer `--duration`",))
    if (size := stats.effective_size(n, p99.get("dependence"))) < p99["needed"]:
        message = f"the true p99 may be above its interval, since the effective sample size is {size} ({n} responses"
        message += f", autocorrelated), and the p99 needs {p99['needed']}: use a longer `--duration`"
        return Validity(cautions=(message,))
    return Validity()


def judge_identity(infos: Sequence[JsonObject]) -> Validity:
    """Return the validity by the responses of `GET /info` at each run: all runs must measure the same server setup."""
    values = {name: list(dict.fromkeys(str(_lookup(info, path)) for info in infos)) for name, path in _IDENTITY.items()}
    return Validity(
        tuple(
            f"the runs differ in {name} ({', '.join(found)}): do not change the server during a benchmark"
            for name, found in values.items()
            if len(found) > 1
        )
    )


def merge(*validities: Validity) -> Validity:
    """Return all reasons and all cautions of several judgments of one run."""
    return Validity(
        tuple(reason for validity in validities for reason in validity.reasons),
        tuple(caution for validity in validities for caution in validity.cautions),
    )


def combine(runs: Sequence[Validity], pooled: JsonObject, budget_percent: float, searched: bool = False) -> Validity:
    """Return the validity of the runs of one configuration, whose pooled summary is given.

    It is invalid if one run is, if all runs together have too few samples, if failures exceed the error budget, or if
    a closed loop has too many rejections.
    """
    each = [
        Validity(run.labeled(f"run {number}").reasons if len(runs) > 1 else run.reasons, run.cautions)
        for number, run in enumerate(runs, 1)
    ]
    found = merge(*each, judge_samples(pooled), judge_requests(pooled, budget_percent, searched))
    return Validity(found.reasons, tuple(highest_shares(found.cautions)))


def highest_shares(cautions: Sequence[str]) -> list[str]:
    """Return different warnings, and of those that differ only in shares the one with the highest first share."""
    alike: dict[str, list[str]] = {}
    for caution in cautions:
        alike.setdefault(kind_of(caution), []).append(caution)
    return [_highest(each) for each in alike.values()]


def _highest(alike: Sequence[str]) -> str:
    found = max(alike, key=lambda caution: int(share[1]) if (share := _SHARE.search(caution)) else 0)
    return found if len(set(alike)) == 1 else up_to(found)


def up_to(caution: str) -> str:
    """Return a warning whose first share is the highest of several."""
    return _SHARE.sub(r"up to \1%", caution, count=1)


def kind_of(caution: str) -> str:
    """Return a warning without its shares, such as those of the cores or of the samples."""
    return _SHARE.sub("%", caution)


def _lookup(info: JsonObject, path: Sequence[str]) -> Any:
    """Return the value at a path of keys; None if it does not exist."""
    value: Any = info
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
