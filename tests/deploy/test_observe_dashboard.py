"""The dashboard: every query is PromQL of known metrics, and Grafana gets a valid layout."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from inferctl.deploy.observe.alerts import rules
from inferctl.deploy.observe.dashboard import dashboard
from inferctl.deploy.observe.watched import Watched, WatchedFlavor, template
from inferctl.manifests import metric_names
from tests.deploy.watched_models import CHAT, EMBED, EXPORTERS, KNOWN_METRICS
from tests.processes import execute

BOTH = pytest.mark.parametrize("watched", [EMBED, CHAT], ids=lambda watched: watched.name)


def panels(watched: Watched) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(watched)["panels"] if panel["type"] != "row"]


def expressions(watched: Watched) -> list[str]:
    return [target["expr"] for panel in panels(watched) for target in panel["targets"]]


def test_the_templates_name_only_what_a_model_can_have() -> None:
    possible = {name for each in (EMBED, CHAT) for flavor in each.flavors for name in each.features(flavor)}
    alerts, rows = template("alerts.yaml")["alerts"], template("dashboard.yaml")["rows"]
    shown = [panel for row in rows for panel in row["panels"]]
    queries = [each for panel in shown for each in panel["queries"].values() if isinstance(each, dict)]
    assert {each.get("only") for each in [*alerts, *rows, *shown, *queries]} == possible


@BOTH
def test_queries_use_only_known_metrics(watched: Watched) -> None:
    for expression in expressions(watched):
        assert metric_names.used(expression), expression
        assert metric_names.used(expression) <= KNOWN_METRICS, expression


def test_every_metric_of_the_lists_is_used() -> None:
    used = set[str]()
    for watched in (EMBED, CHAT):
        used |= {name for each in expressions(watched) for name in metric_names.used(each)}
        used |= {name for rule in rules(watched) for name in metric_names.used(rule["expr"])}
    assert used >= EXPORTERS


@BOTH
def test_prometheus_accepts_every_query(watched: Watched, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool not found; `apt-get install prometheus` installs it")
    rules = [
        {"record": f"query:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions(watched))
    ]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    execute(promtool, "check", "rules", tmp_path / "rules.yaml", code=0)


@BOTH
def test_panels_do_not_overlap_and_stay_in_the_grid(watched: Watched) -> None:
    taken = set[tuple[int, int]]()
    found = dashboard(watched)["panels"]
    for panel in found:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in found]
    assert all(earlier < later for earlier, later in pairwise(numbers))


@BOTH
def test_legends_use_the_labels_of_their_query(watched: Watched) -> None:
    for panel in panels(watched):
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])]
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert all(re.search(rf"by \([^)]*\b{label}\b", target["expr"]) for label in labels), target


def test_the_planned_rate_says_whether_it_was_measured() -> None:
    def legends(*flavors: WatchedFlavor) -> list[str]:
        watched = Watched("m", "n", "embed", flavors)
        return [target["legendFormat"] for panel in panels(watched) for target in panel["targets"]]

    measured, assumed = WatchedFlavor("a", 1, 1, 10, measured=True), WatchedFlavor("b", 1, 1, 10)
    assert "planned (receipts)" in legends(measured)
    assert "planned (partly assumed)" in legends(measured, assumed)
    assert not any("planned" in each for each in legends(measured, WatchedFlavor("c", 1, 1)))


def test_the_dashboards_of_two_models_have_different_ids() -> None:
    ids = {dashboard(watched)["uid"] for watched in (EMBED, CHAT)}
    assert len(ids) == 2
    assert all(len(each) <= 40 for each in ids)


@pytest.mark.parametrize("name", ["embed-l4", "e" * 46])
def test_the_pods_of_placeholders_are_not_pods_of_servers(name: str) -> None:
    """A long name is cut after 58 characters, and five random ones follow: `...-overflow-7dbcdfg`."""
    flavor = WatchedFlavor(name=name, cold_start_s=240, load_s=60)
    pods = Watched(name="embed", namespace="inference", task="embed", flavors=(flavor,)).pod_names()

    def pod(deployment: str) -> str:
        return f"{deployment}-7d9f8c6b5d-"[:58] + "bcdf4"

    assert re.fullmatch(pods, pod(name))
    assert not re.fullmatch(pods, pod(f"{name}-overflow"))
