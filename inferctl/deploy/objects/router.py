"""Routing with a Gateway and an endpoint picker: an InferencePool of the servers, and the picker that chooses one.

The picker (llm-d-router) reads the metrics of each server and prefers the one with the fewest requests.
"""

from __future__ import annotations

from inferctl.deploy import manifest
from inferctl.deploy.objects.containers import container_security, pod_base, resources, template
from inferctl.deploy.objects.metadata import ENGINE, SERVER, Object, labels_of, metadata
from inferctl.deploy.objects.policy import disruption_budget, picker_policy, service_account
from inferctl.deploy.objects.workload import port
from inferctl.deploy.plan import ModelPlan

PICKER = "picker"
IMAGE = "ghcr.io/llm-d/llm-d-router-endpoint-picker:v0.11.0"
_PORT = 9002
_HEALTH = 9003
_METRICS = 9090
_CONFIG = "config.yaml"
_FOLDER = "/etc/picker"


def objects(model: ModelPlan, namespace: str) -> list[Object]:
    """Return the pool of the servers of `model` and its picker."""
    name, labels = f"{model.name}-{PICKER}", labels_of(model.name, PICKER)
    text = manifest.dump([_configuration()])
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(name, namespace, labels),
        "data": {_CONFIG: text},
    }
    ports = [
        {"name": "grpc", "port": _PORT, "targetPort": "grpc", "protocol": "TCP", "appProtocol": "kubernetes.io/h2c"}
    ]
    picker = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, namespace, labels),
        "spec": {"type": "ClusterIP", "selector": labels, "ports": ports},
    }
    return [
        _pool(model, namespace, name),
        service_account(name, namespace, labels),
        *_permissions(name, namespace, labels),
        config,
        picker,
        _deployment(model, name, namespace, text),
        disruption_budget(name, namespace, labels),
        picker_policy(model.name, namespace, PICKER, port(model)),
    ]


def _pool(model: ModelPlan, namespace: str, picker: str) -> Object:
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": metadata(model.name, namespace, labels_of(model.name, SERVER)),
        "spec": {
            "selector": {"matchLabels": labels_of(model.name, SERVER)},
            "targetPorts": [{"number": port(model)}],
            # Optional in the schema, but most gateways require it.
            "endpointPickerRef": {
                "name": picker,
                "port": {"number": _PORT},
                "failureMode": "FailOpen",  # without the picker, the gateway balances on its own
            },
        },
    }


def _configuration() -> Object:
    """Return the configuration of the picker: which metrics inferctl's server has, and what counts."""
    engine = {
        "name": ENGINE["llm-d.ai/engine-type"],
        "queuedRequestsSpec": "inferctl_requests_waiting",
        "runningRequestsSpec": "inferctl_requests_in_flight",
    }
    scorers = ["queue-scorer", "running-requests-size-scorer"]
    return {
        "apiVersion": "llm-d.ai/v1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "metrics-data-source"},
            {"type": "core-metrics-extractor", "parameters": {"engineConfigs": [engine]}},
            *({"type": scorer} for scorer in scorers),
            {"type": "max-score-picker"},
            {"type": "single-profile-handler"},
        ],
        "schedulingProfiles": [
            {
                "name": "default",
                "plugins": [
                    *({"pluginRef": scorer, "weight": 1} for scorer in scorers),
                    {"pluginRef": "max-score-picker"},
                ],
            }
        ],
    }


def _permissions(name: str, namespace: str, labels: dict[str, str]) -> list[Object]:
    """Return what the picker may read: pods and pools of its namespace."""
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["inference.networking.k8s.io"],
            "resources": ["inferencepools"],
            "verbs": ["get", "list", "watch"],
        },
        {
            "apiGroups": ["llm-d.ai", "inference.networking.x-k8s.io"],
            "resources": ["inferenceobjectives", "inferencemodelrewrites"],
            "verbs": ["get", "list", "watch"],
        },
    ]
    group = "rbac.authorization.k8s.io"
    role = {
        "apiVersion": f"{group}/v1",
        "kind": "Role",
        "metadata": metadata(name, namespace, labels),
        "rules": rules,
    }
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": metadata(name, namespace, labels),
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
    }
    return [role, binding]


def _deployment(model: ModelPlan, name: str, namespace: str, text: str) -> Object:
    labels = labels_of(model.name, PICKER)
    health = {"grpc": {"port": _HEALTH, "service": "envoy.service.ext_proc.v3.ExternalProcessor"}}
    container = {
        "name": PICKER,
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": [
            *("--pool-name", model.name, "--pool-namespace", namespace),
            *("--grpc-port", str(_PORT), "--grpc-health-port", str(_HEALTH)),
            *("--config-file", f"{_FOLDER}/{_CONFIG}", "--zap-encoder", "json"),
        ],
        "ports": [
            {"name": "grpc", "containerPort": _PORT, "protocol": "TCP"},
            {"name": "grpc-health", "containerPort": _HEALTH, "protocol": "TCP"},
            {"name": "metrics", "containerPort": _METRICS, "protocol": "TCP"},
        ],
        "resources": resources("1", "512Mi"),
        "securityContext": container_security(),
        "livenessProbe": {**health, "initialDelaySeconds": 10, "periodSeconds": 10},
        "readinessProbe": {**health, "periodSeconds": 5},
        "volumeMounts": [{"name": "config", "mountPath": _FOLDER, "readOnly": True}],
    }
    pod = {
        **pod_base(name, grace_s=130),
        "automountServiceAccountToken": True,  # it watches pods and the pool
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": name}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, namespace, labels),
        "spec": {
            "replicas": 1,  # pickers do not share what they know
            "revisionHistoryLimit": 3,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": labels},
            "template": template(labels, pod, config=text),
        },
    }
