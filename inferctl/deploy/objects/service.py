"""The Service of a model, and what lets Prometheus find its servers."""

from __future__ import annotations

from inferctl.deploy.objects.metadata import HTTP_PORT, SERVER, Object, labels_of, metadata
from inferctl.manifests.label_keys import FLAVOR, NAME

PORT = 80


def service(model: str, namespace: str) -> Object:
    """Return the Service of all servers of a model, over all flavors."""
    labels = labels_of(model, SERVER)
    port = {"name": HTTP_PORT, "port": PORT, "targetPort": HTTP_PORT, "protocol": "TCP", "appProtocol": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(model, namespace, labels),
        # Requests stay in the zone of their client. From 1.34 it is an alias of PreferSameZone, which older ones lack.
        "spec": {"type": "ClusterIP", "selector": labels, "ports": [port], "trafficDistribution": "PreferClose"},
    }


def monitor(model: str, namespace: str) -> Object:
    """Return the ServiceMonitor of the servers. Its series have the labels `service` and `inferctl_io_flavor`."""
    labels = labels_of(model, SERVER)
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": metadata(model, namespace, labels),
        "spec": {
            "selector": {"matchLabels": labels},
            "podTargetLabels": [NAME, FLAVOR],
            "endpoints": [{"port": HTTP_PORT, "path": "/metrics", "interval": "15s", "scrapeTimeout": "10s"}],
        },
    }
