"""Taints and tolerations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from inferctl.manifests.kubernetes import fields


class Taint(NamedTuple):
    """A taint of a node."""

    key: str
    value: str
    effect: str

    def __str__(self) -> str:
        return f"{self.key}{f'={self.value}' if self.value else ''}:{self.effect}"


UNSCHEDULABLE = Taint("node.kubernetes.io/unschedulable", "", "NoSchedule")
# Taints of PreferNoSchedule only lower a score.
_FILTERING = ("NoSchedule", "NoExecute")


def tolerates(tolerations: Iterable[Mapping[str, Any]], taint: Taint) -> bool:
    """Return whether one of the tolerations tolerates `taint`."""
    return any(_tolerates(each, taint) for each in tolerations)


def untolerated(tolerations: Sequence[Mapping[str, Any]], taints: Iterable[Taint]) -> Taint | None:
    """Return the first taint that keeps a pod with these tolerations away; None if there is none."""
    keeping = (taint for taint in taints if taint.effect in _FILTERING)
    return next((taint for taint in keeping if not tolerates(tolerations, taint)), None)


def _tolerates(toleration: Mapping[str, Any], taint: Taint) -> bool:
    effect, key = fields.text(toleration, "effect"), fields.text(toleration, "key")
    if effect and effect != taint.effect:
        return False
    if key and key != taint.key:
        return False
    match fields.text(toleration, "operator"):
        case "Exists":
            return True
        case "" | "Equal":
            return fields.text(toleration, "value") == taint.value
    return False


def of_node(spec: Mapping[str, Any]) -> tuple[Taint, ...]:
    """Return the taints in the spec of a Node."""
    return tuple(
        Taint(fields.text(each, "key"), fields.text(each, "value"), fields.text(each, "effect"))
        for each in fields.items(spec, "taints")
    )
