"""The Services of a model, and what lets Prometheus find its servers."""

from __future__ import annotations

from inferctl.deploy.objects.metadata import HTTP_PORT, HTTPS_PORT, SERVER, Object, labels_of, metadata
from inferctl.manifests.label_keys import FLAVOR, NAME

PORT, TLS_PORT = 80, 443
METRICS_PORT = "metrics"
# Component of the headless Service: the same pods, under one address each.
PODS = "pods"


def service(
    model: str, namespace: str, component: str = SERVER, metrics: int | None = None, *, tls: bool = False
) -> Object:
    """Return the Service of all pods of a component, over all flavors. `metrics`: port of metrics of its own."""
    labels = labels_of(model, component)
    name, port = (HTTPS_PORT, TLS_PORT) if tls else (HTTP_PORT, PORT)
    ports: list[Object] = [{"name": name, "port": port, "targetPort": name, "protocol": "TCP", "appProtocol": name}]
    if metrics:
        ports.append({"name": METRICS_PORT, "port": metrics, "targetPort": METRICS_PORT, "protocol": "TCP"})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(model if component == SERVER else f"{model}-{component}", namespace, labels),
        # Requests stay in the zone of their client. From 1.34 it is an alias of PreferSameZone, which older ones lack.
        "spec": {"type": "ClusterIP", "selector": labels, "ports": ports, "trafficDistribution": "PreferClose"},
    }


def headless(model: str, namespace: str) -> Object:
    """Return a Service without an address of its own: its name means the addresses of all ready servers."""
    found = service(model, namespace)
    found["metadata"] = metadata(headless_name(model), namespace, labels_of(model, PODS))
    del found["spec"]["trafficDistribution"]
    found["spec"]["clusterIP"] = "None"
    return found


def headless_name(model: str) -> str:
    """Return the name of the headless Service."""
    return f"{model}-{PODS}"


def monitor(model: str, namespace: str, component: str = SERVER, port: str = HTTP_PORT) -> Object:
    """Return the ServiceMonitor of a component. Its series have the labels `service` and `inferctl_io_flavor`."""
    labels = labels_of(model, component)
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": metadata(model if component == SERVER else f"{model}-{component}", namespace, labels),
        "spec": {
            "selector": {"matchLabels": labels},
            "podTargetLabels": [NAME, FLAVOR],
            "endpoints": [{"port": port, "path": "/metrics", "interval": "15s", "scrapeTimeout": "10s"}],
        },
    }
