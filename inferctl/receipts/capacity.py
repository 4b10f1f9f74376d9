"""The capacity of one replica, from a receipt, for the admission control of a server and for manifests.

The batch latency model is `seconds per batch = fixed_s + tokens / tokens_per_s`. A server learns it while it runs and
reports it as `pace` in `GET /info`. This module imports no numeric library, since other packages read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InvalidRunError, NotEnoughEvidenceError, UsageError
from inferctl.receipts.receipt import Receipt

SCHEMA = "inferctl.capacity/1"
# The median of several models is chosen by the latency of a batch of this many tokens.
_TOKENS = 2048


@dataclass(frozen=True)
class ServedRate:
    """What one replica served: requests per second and, with the tokens of a request, tokens per second.

    For generation, a request has the tokens of its prompt and of its answer. `within_slo` is True for the result of a
    search, and False for a closed loop, which shows a throughput but no SLO.
    """

    requests_per_s: float
    tokens_per_request: float
    within_slo: bool

    @property
    def tokens_per_s(self) -> float:
        return self.requests_per_s * self.tokens_per_request


def served_rate(sealed: Receipt) -> ServedRate:
    """Return the rate that a receipt of any task supports: that of its search, else that of its closed loop.

    Raises `InvalidRunError` for an invalid receipt, and `NotEnoughEvidenceError` if no rate was shown to meet the SLO,
    if the load was an open loop, or if the server counted no tokens.
    """
    data = sealed.data
    _check_valid(sealed)
    summary = data["summary"]
    tokens = summary.get("tokens_per_request")
    if sealed.task == "generate":
        answer = summary.get("output_tokens_per_request")
        tokens = tokens + answer if tokens and answer else None
    again = "search for the highest rate within the SLO: `inferctl bench --search --slo MS`"
    if not tokens:
        raise NotEnoughEvidenceError(f"{sealed.path} has no tokens per request: its server counted none", again)
    if search := data.get("search"):
        best = search.get("max_goodput_rps")
        if not best:
            reason = search.get("reason") or search.get("verdict")
            raise NotEnoughEvidenceError(f"{sealed.path}: no rate was shown to meet the SLO ({reason})", again)
        return ServedRate(best, tokens, within_slo=True)
    if (sealed.load.get("mode") or "closed") != "closed":
        raise NotEnoughEvidenceError(f"{sealed.path} has an open loop without a search, which shows no limit", again)
    return ServedRate(summary["requests_per_s"], tokens, within_slo=False)


def _check_valid(sealed: Receipt) -> None:
    if reasons := sealed.data["validity"]["reasons"]:
        raise InvalidRunError(f"{sealed.path} is from an invalid run ({reasons[0]})", "measure again")


def capacity(sealed: Receipt, slo_p99_ms: float | None = None) -> dict[str, Any]:
    """Return the capacity that a receipt supports (docs/receipts.md describes each key).

    `slo_p99_ms` replaces the SLO of the receipt. Raises `InvalidRunError` for an invalid receipt,
    `NotEnoughEvidenceError` if its server reported no batch latency model, and `UsageError` if its search had another
    SLO.
    """
    data = sealed.data
    _check_valid(sealed)
    if sealed.task == "generate":
        raise UsageError(
            f"{sealed.path} is of generation, which has no capacity file",
            "set it as the `receipt` of a flavor: `inferctl deploy` reads the rate of a search from it",
        )
    if len(sealed.load.get("names") or ()) > 1:
        raise UsageError(
            f"{sealed.path} is of several names, and a capacity is of one", "measure it with `--names NAME`"
        )
    pace = _pace(data["runs"])
    if pace is None:
        raise NotEnoughEvidenceError(
            f"{sealed.path} has no batch latency: its server reported no `pace` in GET /info",
            "measure an inferctl server under a load that saturates it",
        )
    search = data.get("search") or {}
    slo = slo_p99_ms or search.get("slo_p99_ms") or (data.get("slo") or {}).get("p99_ms")
    if search and slo != search["slo_p99_ms"]:
        raise UsageError(
            f"the search of this receipt was for p99 {search['slo_p99_ms']:g} ms, not {slo:g} ms",
            f"search again: `inferctl bench --search --slo {slo:g}`",
        )
    return {
        "schema": SCHEMA,
        "fixed_s": pace["fixed_s"],
        "tokens_per_s": pace["tokens_per_s"],
        "slo_p99_ms": slo,
        "max_goodput_rps": search.get("max_goodput_rps"),
        "band_rps": search.get("band_rps"),
        "first_failing_rps": search.get("first_failing_rps"),
        "limited_by": search.get("limited_by"),
        "tokens_per_request": data["summary"].get("tokens_per_request"),
        "model_sha256": (data.get("model") or {}).get("sha256"),
        "precision": data["precision"]["effective"],
        "max_batch_tokens": ((data.get("server") or {}).get("limits") or {}).get("max_batch_tokens"),
        "parallel_batches": (data.get("server") or {}).get("parallel_batches") or 1,
        "hardware": data["hardware"]["key"],
        "hardware_name": data["hardware"]["name"],
        "image_digest": (data.get("image") or {}).get("digest"),
        "measured": data["created"],
        "receipt_seal": data["seal"],
    }


def _pace(runs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return the median of the batch latency models at the end of the runs; None if no server reported one."""
    known = [pace for run in runs if _usable(pace := run.get("pace") or {})]
    known.sort(key=lambda pace: pace["fixed_s"] + _TOKENS / pace["tokens_per_s"])
    return known[(len(known) - 1) // 2] if known else None


def _usable(pace: Mapping[str, Any]) -> bool:
    fixed, rate = pace.get("fixed_s"), pace.get("tokens_per_s")
    if not isinstance(fixed, int | float) or not isinstance(rate, int | float):
        return False
    return 0 <= fixed < math.inf and 0 < rate < math.inf


def sentence(found: Mapping[str, Any]) -> str:
    """Return a capacity in words."""
    batch = f"a batch takes {found['fixed_s'] * 1e3:.1f} ms plus 1 s per {found['tokens_per_s']:,.0f} tokens"
    slo = f"p99 {found['slo_p99_ms']:g} ms" if found["slo_p99_ms"] else None
    best = found["max_goodput_rps"]
    if best:
        return f"{batch}; the server meets {slo} up to {best:g} requests/s"
    return f"{batch}; " + (f"no rate was shown to meet {slo}" if slo else "no SLO was set")
