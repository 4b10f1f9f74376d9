"""The alerts of a model, as rules for Prometheus: those of alerts.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inferctl.deploy.observe.watched import Watched, filled, template


def rules(watched: Watched) -> Iterator[dict[str, Any]]:
    """Yield the rules of a model. Only those of different flavors have the same name."""
    for each in template("alerts.yaml")["alerts"]:
        for flavor in watched.flavors if each.get("each") == "flavor" else [None]:
            if each.get("only") not in watched.features(flavor):
                continue
            found = filled(each, watched.values(flavor))
            labels = {"severity": found["severity"], "namespace": watched.namespace, "model": watched.name}
            yield {
                "alert": found["alert"],
                "expr": found["expr"],
                "for": found["for"],
                "labels": labels | ({"flavor": flavor.name} if flavor else {}),
                "annotations": {"summary": f"{watched.name}: {found['summary']}"},
            }


def groups(watched: Watched) -> dict[str, Any]:
    """Return a plain rule file for Prometheus."""
    return {"groups": [{"name": f"inferctl.{watched.namespace}.{watched.name}", "rules": list(rules(watched))}]}
