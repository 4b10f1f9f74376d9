"""Usage events: a worker next to each server, and with a broker one that stores them in the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.deploy.objects.containers import container_security, empty, pod_security, resources
from inferctl.deploy.objects.metadata import Object, labels_of, metadata
from inferctl.deploy.objects.policy import Endpoint, egress_policy, endpoint
from inferctl.deploy.plan import ModelPlan
from inferctl.errors import UsageError
from inferctl.sizes import parse_size
from inferctl.spec import Spec

WORKER = "worker"
CONSUMER = "usage-worker"
DATA = "/metering"
# Key of the Secret with the URL of the ledger.
LEDGER_KEY = "url"
# Of the worker next to a server.
WORKER_CORES = 0.1
_VOLUME = "metering"
_MIB = 1024 * 1024
_POSTGRES_PORT = 5432
# The outbox is below its maximum size, and SQLite writes a log next to it.
_SPARE_MIB = 256


def check(spec: Spec) -> None:
    """Raise `UsageError` if usage events are recorded, but the spec does not say who stores them."""
    if spec.metering.mode == "off":
        return
    deploy = spec.deploy
    if not deploy.tools_image:
        raise UsageError(
            "metering requires a worker in each pod, and images of servers do not contain it",
            "set deploy.tools_image to an image with `inferctl[ledger,broker]`",
        )
    if not deploy.ledger_secret and not deploy.broker:
        raise UsageError(
            "metering.mode is on, but nothing stores the usage events",
            "set deploy.ledger_secret, or deploy.broker and the worker that reads it",
        )


def environment(spec: Spec) -> dict[str, str]:
    """Return the settings of the server."""
    if spec.metering.mode == "off":
        return {}
    return {"INFERCTL_METERING_MODE": spec.metering.mode, "INFERCTL_METERING_DATA": DATA}


def volumes(spec: Spec) -> list[tuple[Object, Object]]:
    """Return the volume of the outbox with its mount. It is on the node's disk and ends with the pod."""
    if spec.metering.mode == "off":
        return []
    mebibytes = parse_size(spec.metering.outbox_size) // _MIB + _SPARE_MIB
    return [empty(_VOLUME, DATA, f"{mebibytes}Mi")]


def sidecars(spec: Spec) -> list[Object]:
    """Return the worker of a server. It starts before the server and ends after it, so it stores the last events."""
    if spec.metering.mode == "off":
        return []
    deploy = spec.deploy
    source = _broker(spec) if deploy.broker else [_ledger(spec)]
    return [
        {
            "name": WORKER,
            "image": deploy.tools_image,
            "imagePullPolicy": "IfNotPresent",
            "restartPolicy": "Always",
            "command": ["inferctl", "worker", "--data", DATA],
            "env": source,
            "resources": resources(f"{WORKER_CORES * 1000:g}m", "256Mi"),
            "securityContext": container_security(),
            "volumeMounts": [mount for _, mount in volumes(spec)],
        }
    ]


def egress(spec: Spec, namespace: str) -> list[Endpoint]:
    """Return what the worker of a server connects to."""
    if spec.metering.mode == "off":
        return []
    if spec.deploy.broker:
        return [endpoint(spec.deploy.broker, namespace)]
    return [Endpoint(_POSTGRES_PORT, None)]


def consumers(models: Sequence[ModelPlan], namespace: str) -> list[Object]:
    """Return the workers that read brokers, one for each pair of broker and ledger, and what they may connect to."""
    found: dict[tuple[str, str], Spec] = {}
    for model in models:
        deploy = model.spec.deploy
        if model.spec.metering.mode != "off" and deploy.broker and deploy.ledger_secret:
            found.setdefault((deploy.broker, deploy.ledger_secret), model.spec)
    objects: list[Object] = []
    for number, spec in enumerate(found.values(), 1):
        name = CONSUMER if number == 1 else f"{CONSUMER}-{number}"
        selector = labels_of(name, CONSUMER)
        broker = endpoint(spec.deploy.broker or "", namespace)
        objects.append(_consumer(name, namespace, spec))
        objects.append(egress_policy(name, namespace, selector, [broker, Endpoint(_POSTGRES_PORT, None)]))
    return objects


def _consumer(name: str, namespace: str, spec: Spec) -> Object:
    labels = labels_of(name, CONSUMER)
    tmp, tmp_mount = empty("tmp", "/tmp", "64Mi")
    container = {
        "name": WORKER,
        "image": spec.deploy.tools_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["inferctl", "worker", "--consume"],
        "env": [*_broker(spec), _ledger(spec)],
        "resources": resources("250m", "512Mi"),
        "securityContext": container_security(),
        "volumeMounts": [tmp_mount],
    }
    pod = {
        "serviceAccountName": CONSUMER,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [tmp],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, namespace, labels),
        "spec": {
            "replicas": 1,  # the ledger ignores what it has, so a second worker would only repeat the work
            "revisionHistoryLimit": 3,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _broker(spec: Spec) -> list[Object]:
    return [{"name": "INFERCTL_METERING_BROKER", "value": spec.deploy.broker}]


def _ledger(spec: Spec) -> Object:
    reference = {"name": spec.deploy.ledger_secret, "key": LEDGER_KEY}
    return {"name": "INFERCTL_METERING_LEDGER", "valueFrom": {"secretKeyRef": reference}}
