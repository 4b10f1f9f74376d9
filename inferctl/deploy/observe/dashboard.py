"""The Grafana dashboard of a model, in the classic JSON model, which Grafana imports and its sidecar loads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from inferctl.deploy.observe.watched import Watched, filled, template

# Of Grafana 12 and 13. Grafana converts older ones when it loads them.
SCHEMA_VERSION = 42
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _IN_ROW = 8, 8, 3  # of a panel; a row has 24 columns


def dashboard(watched: Watched) -> dict[str, Any]:
    """Return the dashboard of a model. It needs kube-state-metrics; the panels of GPUs need DCGM Exporter."""
    identity = f"{watched.namespace}/{watched.name}"
    return {
        "uid": "inferctl-" + hashlib.sha256(identity.encode()).hexdigest()[:24],  # at most 40 characters
        "title": f"inferctl {watched.name} ({watched.namespace})",
        "tags": ["inferctl", watched.task],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "templating": {
            "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": list(_laid_out(_rows(watched))),
    }


def _rows(watched: Watched) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of dashboard.yaml that the model has: title and panels, each with its queries by legend."""
    features, values = watched.features(), watched.values()
    for row in template("dashboard.yaml")["rows"]:
        if row.get("only") in features:
            panels = [filled(each, values) for each in row["panels"] if each.get("only") in features]
            for panel in panels:
                panel["queries"] = {
                    legend: query if isinstance(query, str) else query["expr"]
                    for legend, query in panel["queries"].items()
                    if isinstance(query, str) or query["only"] in features
                }
            yield row["row"], panels


def _laid_out(rows: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows and their panels with their places."""
    number = top = 0
    for title, row in rows:
        number += 1
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for index, panel in enumerate(row):
            number += 1
            left, line = index % _IN_ROW * _WIDTH, index // _IN_ROW
            yield _json(panel, number, {"h": _HEIGHT, "w": _WIDTH, "x": left, "y": top + _HEIGHT * line})
        top += _HEIGHT * -(-len(row) // _IN_ROW)


def _json(panel: dict[str, Any], number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    custom |= {"stacking": {"mode": "normal" if panel.get("stacked") else "none", "group": "A"}}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel["title"],
        "description": panel["description"],
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel["unit"], "min": 0, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel["queries"].items())
        ],
    }
