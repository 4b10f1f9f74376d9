"""The Kubernetes objects of a model's monitoring: alerts for the Prometheus operator, and a dashboard for Grafana."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from inferctl.config.spec_types import CACHED
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.objects.metadata import SERVER, Object, labels_of, metadata
from inferctl.deploy.observe.alerts import groups
from inferctl.deploy.observe.dashboard import dashboard
from inferctl.deploy.observe.watched import Watched, WatchedFlavor
from inferctl.deploy.plan import DeploymentPlan, FlavorPlan, ModelPlan

# Grafana's sidecar loads ConfigMaps with this label, in the default settings of its chart.
_GRAFANA = {"grafana_dashboard": "1"}


def rules(plan: DeploymentPlan, model: ModelPlan) -> Object:
    """Return the alerts of a model as a PrometheusRule."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(f"{model.name}-alerts", plan.namespace, labels_of(model.name, SERVER)),
        "spec": groups(watched(plan, model)),
    }


def config_map(plan: DeploymentPlan, model: ModelPlan) -> Object:
    """Return the dashboard of a model as a ConfigMap, which Grafana's sidecar loads."""
    labels = labels_of(model.name, SERVER) | _GRAFANA
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(f"{model.name}-dashboard", plan.namespace, labels),
        "data": {f"inferctl-{model.name}.json": _json(dashboard(watched(plan, model)))},
    }


def watched(plan: DeploymentPlan, model: ModelPlan) -> Watched:
    """Return what dashboard and alerts need to know about a model."""
    spec = model.spec
    return Watched(
        name=model.name,
        namespace=plan.namespace,
        task=model.tasks[0],
        flavors=tuple(_flavor(flavor, plan.clusters) for flavor in model.flavors),
        cache=bool({*model.tasks} & {*CACHED}) and spec.cache.size is not None,
        metering=spec.metering.mode != "off",
        keda=spec.deploy.scaling == "keda",
        gpu=any(flavor.hardware.kind == "cuda" for flavor in model.flavors),
    )


def _json(document: dict[str, Any]) -> str:
    """Return a dashboard with one line for each panel, so that a changed panel is one changed line."""
    panels = ",\n  ".join(map(json.dumps, document["panels"]))
    return f"{json.dumps(document | {'panels': []})[:-2]}\n  {panels}\n]}}\n"


def _flavor(flavor: FlavorPlan, clusters: Sequence[Cluster]) -> WatchedFlavor:
    placeholders = any(flavor.at(cluster).overflow is not None for cluster in clusters)
    return WatchedFlavor(
        name=flavor.name,
        cold_start_s=math.ceil(flavor.cold_start_s.value),
        load_s=math.ceil(flavor.load_s.value),
        rate=flavor.rate.tokens_per_second if flavor.rate else None,
        measured=flavor.rate is not None and flavor.rate.measured,
        overflow=f"{flavor.name}-overflow" if placeholders else None,
    )
