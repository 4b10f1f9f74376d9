"""Label selectors and node selectors, as Kubernetes matches them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.manifests.kubernetes import fields

# A selector with another value is an error, and matches nothing.
_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_INTEGER = re.compile(r"[+-]?\d+")


class Selector:
    """A label selector, read once to be asked about many pods."""

    def __init__(self, selector: Mapping[str, Any] | None) -> None:
        self._wanted = list(fields.text_map(fields.mapping(selector, "matchLabels")).items())
        self._expressions = fields.items(selector, "matchExpressions")
        self._nothing = selector is None or not all(_VALUE.fullmatch(value) for _, value in self._wanted)

    @property
    def empty(self) -> bool:
        """Whether it has no requirement, and so matches everything. None is not empty: it matches nothing."""
        return not (self._nothing or self._wanted or self._expressions)

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether it matches. None matches nothing, an empty selector everything."""
        if self._nothing:
            return False
        for key, value in self._wanted:
            if labels.get(key) != value:
                return False
        return not self._expressions or all(_met(each, labels) for each in self._expressions)


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Return whether a label selector matches."""
    return Selector(selector).matches(labels)


def with_label_keys(
    selector: Mapping[str, Any] | None, labels: Mapping[str, str], keys: Sequence[str], mismatch: Sequence[str] = ()
) -> Mapping[str, Any] | None:
    """Return `selector` with the pod's own values of `keys` (matchLabelKeys), and without those of `mismatch`.

    Keys that the pod does not have are ignored.
    """
    added = [{"key": key, "operator": "In", "values": [labels[key]]} for key in keys if key in labels]
    added += [{"key": key, "operator": "NotIn", "values": [labels[key]]} for key in mismatch if key in labels]
    if selector is None or not added:
        return selector
    return {**selector, "matchExpressions": [*fields.items(selector, "matchExpressions"), *added]}


def node_matches(spec: Mapping[str, Any], name: str, labels: Mapping[str, str]) -> bool:
    """Return whether a node satisfies the nodeSelector and the required node affinity of a pod spec."""
    wanted = fields.text_map(fields.mapping(spec, "nodeSelector"))
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    required = fields.get(spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    return required is None or node_selector_matches(required, name, labels)


def node_selector_matches(selector: Any, name: str, labels: Mapping[str, str]) -> bool:
    """Return whether one term of a node selector matches. An empty term matches nothing."""
    return any(_term_matches(term, name, labels) for term in fields.items(selector, "nodeSelectorTerms"))


def _term_matches(term: Mapping[str, Any], name: str, labels: Mapping[str, str]) -> bool:
    expressions, of_fields = fields.items(term, "matchExpressions"), fields.items(term, "matchFields")
    if not expressions and not of_fields:
        return False
    return all(_met(each, labels) for each in expressions) and all(
        _holds(each, {"metadata.name": name}) for each in of_fields
    )


def unmet(spec: Mapping[str, Any], name: str, labels: Mapping[str, str]) -> list[str]:
    """Return what a node lacks for the nodeSelector and the required node affinity, one text per requirement."""
    wanted = fields.text_map(fields.mapping(spec, "nodeSelector"))
    found = [
        f"{key} is {_value(labels, key)}, not {value}" for key, value in wanted.items() if labels.get(key) != value
    ]
    required = fields.get(spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    if required is None or node_selector_matches(required, name, labels):
        return found
    terms = fields.items(required, "nodeSelectorTerms")
    for term in terms:
        missing = [_describe(each, labels) for each in fields.items(term, "matchExpressions") if not _met(each, labels)]
        missing += [
            f"its name is not {', '.join(fields.strings(each, 'values'))}"
            for each in fields.items(term, "matchFields")
            if not _holds(each, {"metadata.name": name})
        ]
        found.append(" and ".join(missing) or "an empty term matches no node")
    return found or ["no term of the node affinity can match"]


def _describe(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    key, operator = fields.text(requirement, "key"), fields.text(requirement, "operator")
    values = ", ".join(fields.strings(requirement, "values"))
    wanted = {"In": f"not {values}", "NotIn": "which is excluded", "Exists": "which must exist"}.get(
        operator, "which must not exist" if operator == "DoesNotExist" else f"not {operator} {values}"
    )
    return f"{key} is {_value(labels, key)}, {wanted}"


def _value(labels: Mapping[str, str], key: str) -> str:
    return (labels[key] or '""') if key in labels else "absent"


def _met(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    valid = all(_VALUE.fullmatch(each) for each in fields.strings(requirement, "values"))
    return valid and _holds(requirement, labels)


def _holds(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, operator = fields.text(requirement, "key"), fields.text(requirement, "operator")
    values = fields.strings(requirement, "values")
    value = labels.get(key)
    match operator:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt":
            return value is not None and len(values) == 1 and _compares(value, operator, values[0])
    return False


def _compares(value: str, operator: str, bound: str) -> bool:
    if not (_INTEGER.fullmatch(value) and _INTEGER.fullmatch(bound)):
        return False
    return int(value) > int(bound) if operator == "Gt" else int(value) < int(bound)
