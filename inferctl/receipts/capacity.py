"""The capacity of one replica, from a receipt, for manifests."""

from __future__ import annotations

from dataclasses import dataclass

from inferctl.core.errors import InvalidRunError, NotEnoughEvidenceError
from inferctl.receipts.receipt import Receipt


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
    if reasons := data["validity"]["reasons"]:
        raise InvalidRunError(f"{sealed.path} is from an invalid run ({reasons[0]})", "measure again")
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
