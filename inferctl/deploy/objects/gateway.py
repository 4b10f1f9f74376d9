"""Envoy in front of the servers of a model, with the configuration of `inferctl gateway`."""

from __future__ import annotations

import math
import re
from pathlib import Path

from inferctl.deploy import manifest
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects.containers import (
    container_security,
    empty,
    pod_base,
    reserve_disk,
    resources,
    spread,
    template,
)
from inferctl.deploy.objects.metadata import HTTP_PORT, HTTPS_PORT, Object, labels_of, metadata
from inferctl.deploy.objects.policy import (
    client_policy,
    disruption_budget,
    gateway_policy,
    service_account,
)
from inferctl.deploy.objects.service import METRICS_PORT, headless, headless_name, service
from inferctl.deploy.objects.workload import port
from inferctl.deploy.plan import ModelPlan
from inferctl.gateway import config

GATEWAY = "gateway"
IMAGE = f"envoyproxy/envoy:v{config.ENVOY_VERSION}"
_LISTEN, _LISTEN_TLS = 8080, 8443
_METRICS = 9901
_DRAIN = 9902
_CPUS = 2
_LEAST_REPLICAS, _MOST_REPLICAS = 2, 10
# Of the requested CPU. The rest is for the time until new pods are ready, and for the loss of one.
_UTILIZATION_PERCENT = 60
_FOLDER = Path("/run/inferctl-gateway")
_CONFIG_FOLDER = "/etc/inferctl-gateway"
_CONFIG_FILE = "envoy.yaml"
# Envoy reads which files it uses, and the files, again when they change, as after the renewal of a certificate.
_CERTIFICATE_FILE = "certificate.yaml"
_TLS_FOLDER = Path("/etc/inferctl-gateway-tls")
# Until endpoints of the Service without this pod are known on all nodes.
_ENDPOINTS_S = 5
_MARGIN_S = 5
_MIB = 1024 * 1024

# Envoy drops the requests in flight on SIGTERM, so they end before. The image has bash, and no HTTP client.
_DRAIN_SCRIPT = """\
ask() {
  exec 3<>/dev/tcp/127.0.0.1/PORT || return
  printf '%s HTTP/1.1\\r\\nHost: envoy\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n' "$1" >&3
  cat <&3
  exec 3>&-
}
ask 'POST /drain'
sleep ENDPOINTS
for _ in {1..SECONDS}; do
  ask 'GET /stats?filter=http.clients.downstream_rq_active' | grep -q 'active: 0' && break
  sleep 1
done
"""


def objects(model: ModelPlan, namespace: str) -> list[Object]:
    """Return the gateway of a model, which all clients use."""
    deploy = model.spec.deploy
    text = manifest.dump([bootstrap(model)])
    labels = labels_of(model.name, GATEWAY)
    name = f"{model.name}-{GATEWAY}"
    tls = deploy.gateway_tls_secret is not None
    files = {_CONFIG_FILE: text}
    if tls:
        files[_CERTIFICATE_FILE] = manifest.dump([config.certificates(_settings(model))])
    return [
        service_account(name, namespace),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(name, namespace, labels),
            "data": files,
        },
        _deployment(model, name, namespace, text),
        _autoscaler(model, name, namespace),
        service(model.name, namespace, GATEWAY, _METRICS, tls=tls),
        headless(model.name, namespace),
        disruption_budget(name, namespace, labels),
        gateway_policy(model.name, namespace, GATEWAY, port(model), _listener(model)[0]),
        client_policy(model.name, namespace, GATEWAY, _listener(model)[1]),
    ]


def bootstrap(model: ModelPlan) -> Object:
    """Return Envoy's configuration. The name of the headless Service means the addresses of all ready servers."""
    return config.bootstrap(_settings(model), _FOLDER)


def _settings(model: ModelPlan) -> config.Settings:
    tls = model.spec.deploy.gateway_tls_secret is not None
    return config.Settings(
        host="0.0.0.0",
        port=_listener(model)[1],
        metrics_port=_METRICS,
        metrics_host="0.0.0.0",
        drain_port=_DRAIN,
        dns=(headless_name(model.name), port(model)),
        certificate=_TLS_FOLDER / "tls.crt" if tls else None,
        key=_TLS_FOLDER / "tls.key" if tls else None,
    )


def _listener(model: ModelPlan) -> tuple[str, int]:
    """Return name and number of the port for clients."""
    return (HTTPS_PORT, _LISTEN_TLS) if model.spec.deploy.gateway_tls_secret else (HTTP_PORT, _LISTEN)


def _autoscaler(model: ModelPlan, name: str, namespace: str) -> Object:
    """Return what adds pods at once, and removes one per minute, each of which drains."""
    target = {"type": "Utilization", "averageUtilization": _UTILIZATION_PERCENT}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(name, namespace, labels_of(model.name, GATEWAY)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": _LEAST_REPLICAS,
            "maxReplicas": _MOST_REPLICAS,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
            "behavior": {
                "scaleUp": {"stabilizationWindowSeconds": 0},
                "scaleDown": {
                    "stabilizationWindowSeconds": 300,
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                },
            },
        },
    }


def _deployment(model: ModelPlan, name: str, namespace: str, text: str) -> Object:
    labels = labels_of(model.name, GATEWAY)
    drain = _drain_s(model)
    grace = Noted(
        _ENDPOINTS_S + drain + _MARGIN_S,
        f"preStop: {_ENDPOINTS_S} s + {drain} s, the longest drain of the servers; margin {_MARGIN_S} s",
    )
    volumes, mounts = _volumes(model, name)
    host = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    pod = {
        **pod_base(name, grace_s=grace),
        **spread(labels),
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": host}]
            }
        },
        "containers": [_container(mounts, drain, *_listener(model))],
        "volumes": volumes,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, namespace, labels),
        "spec": {
            "revisionHistoryLimit": 3,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": labels},
            "template": template(labels, reserve_disk(pod), config=text),
        },
    }


def _volumes(model: ModelPlan, name: str) -> tuple[list[Object], list[Object]]:
    run, run_mount = empty("run", str(_FOLDER), "16Mi")
    volumes = [{"name": "config", "configMap": {"name": name}}, run]
    mounts = [{"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True}, run_mount]
    if secret := model.spec.deploy.gateway_tls_secret:
        items = [{"key": _CERTIFICATE_FILE, "path": _CERTIFICATE_FILE}]
        volumes += [
            {"name": "tls", "secret": {"secretName": secret, "defaultMode": 0o440}},
            {"name": "tls-names", "configMap": {"name": name, "items": items}},
        ]
        mounts += [
            {"name": "tls", "mountPath": str(_TLS_FOLDER), "readOnly": True},
            {"name": "tls-names", "mountPath": str(_FOLDER / "tls"), "readOnly": True},
        ]
    return volumes, mounts


def _drain_s(model: ModelPlan) -> int:
    """Return the longest drain of the servers: a request through the gateway takes as long as on its server."""
    return math.ceil(max(flavor.drain_s.value for flavor in model.flavors))


def _drain_script(seconds: int) -> str:
    values = {"PORT": _DRAIN, "ENDPOINTS": _ENDPOINTS_S, "SECONDS": seconds}
    return re.sub("PORT|ENDPOINTS|SECONDS", lambda match: str(values[match[0]]), _DRAIN_SCRIPT)


def _container(mounts: list[Object], drain: int, listener: str, number: int) -> Object:
    heap = config.Settings().max_heap_bytes // _MIB
    memory = Noted(f"{heap + 256}Mi", f"Envoy's heap of {heap} MiB, and 256 MiB for code, threads and buffers")
    ready = {"httpGet": {"path": "/ready", "port": METRICS_PORT}, "timeoutSeconds": 2}
    return {
        "name": GATEWAY,
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["envoy", "--config-path", f"{_CONFIG_FOLDER}/{_CONFIG_FILE}", "--concurrency", str(_CPUS)],
        "args": ["--disable-hot-restart", "--log-level", "warning"],
        "ports": [
            {"name": listener, "containerPort": number, "protocol": "TCP"},
            {"name": METRICS_PORT, "containerPort": _METRICS, "protocol": "TCP"},
        ],
        "resources": resources(str(_CPUS), memory),
        "securityContext": container_security(),
        "startupProbe": {**ready, "periodSeconds": 1, "failureThreshold": 30},
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 1},
        # /ready fails during a drain, which must not restart the container.
        "livenessProbe": {"tcpSocket": {"port": METRICS_PORT}, "periodSeconds": 10, "failureThreshold": 3},
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/bash", "-c", _drain_script(drain)]}}},
        "volumeMounts": mounts,
    }
