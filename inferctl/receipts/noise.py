"""CPU time that neither the server nor the load generator used. Above a limit, differences may be its effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inferctl.receipts.receipt import JsonObject


@dataclass(frozen=True)
class Noise:
    """A use of the machine's cores by others: its `share`, above the limit that `text` names, and what to do."""

    share: float
    text: str
    action: str


# The key of the resources, its limit as a share of all cores, who used them, and what to do.
_SOURCES = (
    ("other_cores", 0.10, "other processes used", "stop them and measure again"),
    ("stolen_cores", 0.05, "the hypervisor withheld", "use a machine with dedicated cores"),
)


def above_limits(resources: Mapping[str, float], cores: int) -> list[Noise]:
    """Return what was above its limit in a run, or in the busiest of several, on a machine with `cores` cores."""
    found = []
    for key, limit, who, action in _SOURCES:
        if (share := resources.get(key, 0.0) / cores) > limit:
            found.append(Noise(round(share, 4), f"{who} {share:.0%} of the cores (limit {limit:.0%})", action))
    return found


def of_receipt(data: JsonObject) -> Sequence[Noise]:
    """Return the noise of a receipt. Its resources are the highest values of all runs."""
    return above_limits(data.get("resources", {}), data["environment"].get("machine_cores") or 1)
