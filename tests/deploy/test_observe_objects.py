"""The monitoring of a plan: its alerts and dashboards name what is in the other manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.deploy import layout
from inferctl.deploy.observe.objects import rules, watched
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.deploy.test_layout import OVERLAYS, Build


def of_kind(objects: Objects, kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


@pytest.fixture(params=OVERLAYS)
def built(request: pytest.FixtureRequest, build: Build) -> Objects:
    return build(plans.files(), request.param)


def rules_of(built: Objects, model: str) -> list[dict[str, Any]]:
    (group,) = of_kind(built, "PrometheusRule")[f"{model}-alerts"]["spec"]["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_alerts_name_objects_of_the_overlay(built: Objects) -> None:
    deployments, scaled = of_kind(built, "Deployment"), of_kind(built, "ScaledObject")
    alerts = json.dumps([rules_of(built, model) for model in ("embed", "chat")]).replace('\\"', '"')
    placeholders = {name for name in deployments if name.endswith("-overflow")}
    assert placeholders <= set(re.findall(r'deployment="([^"]+)"', alerts))
    for model in ("embed", "chat"):
        text = json.dumps(rules_of(built, model)).replace('\\"', '"')
        assert set(re.findall(r'service="([^"]+)"', text)) == {model} <= set(of_kind(built, "Service"))
        assert set(re.findall(r'namespace="([^"]+)"', text)) == {"inference"}
        (names,) = set(re.findall(r'horizontalpodautoscaler=~"\(keda-hpa-\)\?\(([^)]*)\)"', text))
        # A cluster may lack a flavor of the plan.
        assert {name for name in deployments if scaled.get(name) and name.startswith(f"{model}-")} <= set(
            names.split("|")
        )


def test_the_sidecar_of_grafana_finds_a_dashboard_of_what_each_monitor_scrapes(built: Objects) -> None:
    for model in ("embed", "chat"):
        dashboard = of_kind(built, "ConfigMap")[f"{model}-dashboard"]
        assert "grafana_dashboard" in dashboard["metadata"]["labels"]
        (text,) = dashboard["data"].values()
        assert json.loads(text)["title"] == f"inferctl {model} (inference)"
        assert "inferctl_io_flavor" in text or model == "chat"
        assert "inferctl.io/flavor" in of_kind(built, "ServiceMonitor")[model]["spec"]["podTargetLabels"]


def test_what_is_watched_follows_the_plan() -> None:
    plan = plans.plan()
    embed, chat = (watched(plan, model) for model in plan.models)
    assert [flavor.name for flavor in embed.flavors] == ["embed-a100-half", "embed-l4", "embed-t4"]
    assert (embed.task, embed.metering, embed.cache, embed.keda, embed.gpu) == ("embed", True, False, True, True)
    (flavor,) = chat.flavors
    assert (chat.task, chat.metering, flavor.rate, flavor.measured) == ("generate", False, 3000, False)
    assert all(flavor.overflow in (None, f"{flavor.name}-overflow") for flavor in embed.flavors)


def test_without_prometheus_rules_the_alerts_are_plain_files(tmp_path: Path) -> None:
    files = layout.files(plans.plan(plans.embed(omit=["PrometheusRule"]), plans.generate()))
    plan = plans.plan()
    for model in plan.models:
        text = files[f"components/monitoring/{model.name}-alerts.yaml"]
        assert yaml.safe_load(text) == rules(plan, model)["spec"]
