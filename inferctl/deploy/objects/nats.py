"""NATS in the namespace of the deployment: three servers with JetStream, which survive the loss of one."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.config.deploy_spec import Nats
from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size
from inferctl.deploy.endpoints import NATS_PORT, NATS_SERVICE
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import broker
from inferctl.deploy.objects.containers import (
    container_security,
    empty,
    pod_base,
    reserve_disk,
    resources,
    spread,
    template,
)
from inferctl.deploy.objects.metadata import SERVER, Object, from_secret, labels_of, metadata
from inferctl.deploy.objects.metering import CONSUMER
from inferctl.deploy.objects.policy import (
    broker_policy,
    disruption_budget,
    service_account,
)
from inferctl.deploy.plan import ModelPlan
from inferctl.manifests.label_keys import COMPONENT

NATS = "broker"
_NAME = NATS_SERVICE
_PODS = f"{_NAME}-pods"
_REPLICAS = 3
_ROUTES_PORT, _MONITOR_PORT = 6222, 8222
_CLIENTS, _ROUTES, _MONITOR = "nats", "routes", "monitor"
_ROUTES_USER, _ROUTES_KEY = "routes", "cluster-password"
_CONFIG_FILE = "nats.conf"
_CONFIG, _DATA, _RUN = "/etc/nats", "/data", "/run/nats"
_MIB = 1024 * 1024
# The stream of usage events has up to 256 MiB.
_SMALLEST = 1024 * _MIB
# Clients are told to leave within this time, which cannot be shorter.
_LAME_DUCK_S, _LAME_DUCK_GRACE_S, _MARGIN_S = 30, 10, 20

# Without `sync_interval: always`, a power failure loses messages that were acknowledged.
_CONFIGURATION = """\
server_name: $POD_NAME
listen: "0.0.0.0:{clients}"
http: "0.0.0.0:{monitor}"
pid_file: "{run}/nats.pid"
lame_duck_duration: "{lame_duck}s"
lame_duck_grace_period: "{grace}s"
jetstream {{
  store_dir: "{data}"
  max_memory_store: 0
  max_file_store: {storage}
  sync_interval: always
}}
authorization {{
  user: {user}
  password: $CLIENTS
}}
cluster {{
  name: {name}
  listen: "0.0.0.0:{routes}"
  authorization {{
    user: {routes_user}
    password: $ROUTES
  }}
  routes: [{variables}]
}}
"""


def objects(models: Sequence[ModelPlan], namespace: str) -> list[Object]:
    """Return NATS if a model asks for it. Raises `UsageError` if models ask for different ones."""
    wanted = {
        (spec.deploy.nats, spec.deploy.broker_secret): spec
        for spec in (model.spec for model in models)
        if spec.deploy.nats.storage
    }
    if not wanted:
        return []
    if len(wanted) > 1:
        raise UsageError(
            f"deploy.nats or deploy.broker_secret of {' and '.join(spec.name for spec in wanted.values())} differ, but "
            "all models of a namespace have one NATS",
            "write the same values into all specs",
        )
    if any(model.name == _NAME for model in models):
        raise UsageError(f"the name {_NAME} is that of the broker (deploy.nats)", "set another `name` in the spec")
    ((settings, secret),) = wanted
    if _storage(settings) < _SMALLEST:
        raise UsageError(f"deploy.nats.storage: {settings.storage} is too small for usage events", "set 1GiB or more")
    labels, text = labels_of(_NAME, NATS), configuration(settings)
    return [
        service_account(_NAME, namespace),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(_NAME, namespace, labels),
            "data": {_CONFIG_FILE: text},
        },
        _stateful_set(settings, secret or "", namespace, text),
        _service(namespace),
        _headless(namespace),
        disruption_budget(_NAME, namespace, labels),
        broker_policy(
            _NAME,
            namespace,
            labels,
            clients=[{COMPONENT: SERVER}, {COMPONENT: CONSUMER}],
            client_port=NATS_PORT,
            routes_port=_ROUTES_PORT,
        ),
    ]


def configuration(settings: Nats) -> str:
    """Return the configuration of each server. Its passwords are in variables of the environment."""
    return _CONFIGURATION.format(
        clients=NATS_PORT,
        routes=_ROUTES_PORT,
        monitor=_MONITOR_PORT,
        run=_RUN,
        data=_DATA,
        lame_duck=_LAME_DUCK_S,
        grace=_LAME_DUCK_GRACE_S,
        storage=_storage(settings) * 9 // 10,
        user=broker.USER,
        name=_NAME,
        routes_user=_ROUTES_USER,
        variables=", ".join(f"$ROUTE_{number}" for number in range(_REPLICAS)),
    )


def _storage(settings: Nats) -> int:
    return parse_size(settings.storage or "0")


def _environment(secret: str) -> list[Object]:
    """Return the variables of the configuration. NATS parses them like a part of it, so texts need quotes."""
    password = f"$({_ROUTES_KEY.upper().replace('-', '_')})"
    routes = {
        f"ROUTE_{number}": f'"nats-route://{_ROUTES_USER}:{password}@{_NAME}-{number}.{_PODS}:{_ROUTES_PORT}"'
        for number in range(_REPLICAS)
    }
    values = {"CLIENTS": f'"$({broker.PASSWORD_KEY.upper()})"', "ROUTES": f'"{password}"', **routes}
    return [
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        from_secret(broker.PASSWORD_KEY.upper(), secret, broker.PASSWORD_KEY),
        from_secret(_ROUTES_KEY.upper().replace("-", "_"), secret, _ROUTES_KEY),
        *({"name": name, "value": value} for name, value in values.items()),
        # Go collects garbage before the container reaches its limit.
        {"name": "GOMEMLIMIT", "value": "900MiB"},
    ]


def _stateful_set(settings: Nats, secret: str, namespace: str, text: str) -> Object:
    labels = labels_of(_NAME, NATS)
    run, run_mount = empty("run", _RUN, "1Mi")
    host = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    grace = Noted(
        _LAME_DUCK_S + _LAME_DUCK_GRACE_S + _MARGIN_S,
        f"clients leave for another server within {_LAME_DUCK_GRACE_S} + {_LAME_DUCK_S} s; margin {_MARGIN_S} s",
    )
    pod = {
        **pod_base(_NAME, grace_s=grace),
        **spread(labels, revisions=False),
        # Required: with two servers on one node, its loss would stop JetStream. Two of three are enough to start.
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [host]}},
        "containers": [_container(settings, secret, run_mount)],
        "volumes": [{"name": "config", "configMap": {"name": _NAME}}, run],
    }
    claim: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{-(-_storage(settings) // _MIB)}Mi"}},
    }
    if settings.storage_class:
        claim["storageClassName"] = settings.storage_class
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(_NAME, namespace, labels),
        "spec": {
            "replicas": _REPLICAS,
            "revisionHistoryLimit": 3,
            "serviceName": _PODS,
            # One after the other, the first one would wait for the others, without which it is not ready.
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "RollingUpdate"},
            "selector": {"matchLabels": labels},
            "template": template(labels, reserve_disk(pod), config=text),
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
        },
    }


def _container(settings: Nats, secret: str, run_mount: Object) -> Object:
    def probe(path: str, seconds: int, failures: int) -> Object:
        get = {"path": path, "port": _MONITOR}
        return {"httpGet": get, "timeoutSeconds": 5, "periodSeconds": seconds, "failureThreshold": failures}

    return {
        "name": "nats",
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["nats-server", "--config", f"{_CONFIG}/{_CONFIG_FILE}"],
        "env": _environment(secret),
        "ports": [
            {"name": _CLIENTS, "containerPort": NATS_PORT, "protocol": "TCP"},
            {"name": _ROUTES, "containerPort": _ROUTES_PORT, "protocol": "TCP"},
            {"name": _MONITOR, "containerPort": _MONITOR_PORT, "protocol": "TCP"},
        ],
        "resources": resources("1", "1Gi"),
        "securityContext": container_security(),
        # Only a start waits for streams that are behind, so an update stops the next server when this one has them.
        "startupProbe": probe("/healthz", 5, 120),
        "readinessProbe": probe("/healthz?js-server-only=true", 10, 3),
        "livenessProbe": probe("/healthz?js-enabled-only=true", 30, 3),
        # NATS then ignores SIGTERM, and ends when its clients have left.
        "lifecycle": {"preStop": {"exec": {"command": ["nats-server", f"-sl=ldm={_RUN}/nats.pid"]}}},
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": "data", "mountPath": _DATA},
            run_mount,
        ],
    }


def _service(namespace: str) -> Object:
    labels = labels_of(_NAME, NATS)
    port = {"name": _CLIENTS, "port": NATS_PORT, "targetPort": _CLIENTS, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(_NAME, namespace, labels),
        "spec": {"type": "ClusterIP", "selector": labels, "ports": [port]},
    }


def _headless(namespace: str) -> Object:
    """Return the Service that gives each pod a name, also before it is ready: servers need each other to be ready."""
    labels = labels_of(_NAME, NATS)
    port = {"name": _ROUTES, "port": _ROUTES_PORT, "targetPort": _ROUTES, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(_PODS, namespace, labels_of(_NAME, "broker-pods")),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": [port]},
    }
