"""Usage events: their outbox, what the relay of a server needs, and the relay that reads a broker."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size
from inferctl.deploy.endpoints import SCHEME_PORTS, Endpoint, endpoints, events_broker
from inferctl.deploy.objects import broker
from inferctl.deploy.objects.containers import container_security, empty, pod_base, reserve_disk, resources
from inferctl.deploy.objects.metadata import Object, from_secret, labels_of, metadata
from inferctl.deploy.objects.policy import egress_policy
from inferctl.deploy.plan import ModelPlan

CONSUMER = "usage-relay"
DATA = "/metering"
# Key of the Secret with the URL of the ledger.
LEDGER_KEY = "url"
_VOLUME = "metering"
_MIB = 1024 * 1024
# The outbox is below its maximum size, and SQLite writes a log next to it.
_SPARE_MIB = 256


def check(spec: Spec) -> None:
    """Raise `UsageError` if usage events are recorded, but the spec does not say who stores them."""
    if spec.metering.mode == "off":
        return
    deploy = spec.deploy
    if not deploy.tools_image:
        raise UsageError(
            "metering requires a relay in each pod, and images of servers do not contain it",
            "set deploy.tools_image to an image with `inferctl[ledger,broker]`",
        )
    if not deploy.ledger_secret and not events_broker(spec):
        raise UsageError(
            "metering.mode is on, but nothing stores the usage events",
            "set deploy.ledger_secret, or metering.broker and run `inferctl relay --consume`",
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


def relay_options(spec: Spec) -> list[str]:
    """Return the options of the relay of a server."""
    return ["--data", DATA] if spec.metering.mode != "off" else []


def relay_environment(spec: Spec) -> list[Object]:
    """Return the settings of the relay of a server, without those of the broker."""
    return [_ledger(spec)] if spec.metering.mode != "off" and not events_broker(spec) else []


def egress(spec: Spec) -> list[Endpoint]:
    """Return what the relay of a server connects to for usage events. `broker.egress` has the broker."""
    if spec.metering.mode == "off" or events_broker(spec):
        return []
    return _ledger_endpoints(spec)


def _ledger_endpoints(spec: Spec) -> list[Endpoint]:
    """Return where the ledger is. Only the Secret has its whole URL; without `metering.ledger`, it is anywhere."""
    address = spec.metering.ledger
    if address and not address.is_file:
        return endpoints(address.public, spec.deploy.namespace)
    return [Endpoint(SCHEME_PORTS["postgresql"], None)]


def consumers(models: Sequence[ModelPlan], namespace: str) -> list[Object]:
    """Return the relays that read brokers, one for each pair of broker and ledger, and what they may connect to."""
    found: dict[tuple[str, str | None, str], Spec] = {}
    for model in models:
        deploy = model.spec.deploy
        if (url := events_broker(model.spec)) and deploy.ledger_secret:
            found.setdefault((url, deploy.broker_secret, deploy.ledger_secret), model.spec)
    objects: list[Object] = []
    for number, ((url, *_), spec) in enumerate(found.items(), 1):
        name = CONSUMER if number == 1 else f"{CONSUMER}-{number}"
        selector = labels_of(name, CONSUMER)
        to = [*endpoints(url, namespace), *_ledger_endpoints(spec)]
        objects.append(_consumer(name, namespace, spec))
        objects.append(egress_policy(name, namespace, selector, to))
    return objects


def _consumer(name: str, namespace: str, spec: Spec) -> Object:
    labels = labels_of(name, CONSUMER)
    tmp, tmp_mount = empty("tmp", "/tmp", "64Mi")
    container = {
        "name": "relay",
        "image": spec.deploy.tools_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["inferctl", "relay", "--consume"],
        "env": [*broker.variables(spec, broker.EVENTS), _ledger(spec)],
        "resources": resources("250m", "512Mi"),
        "securityContext": container_security(),
        "volumeMounts": [tmp_mount],
    }
    pod = {**pod_base(CONSUMER, grace_s=60), "containers": [container], "volumes": [tmp]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, namespace, labels),
        "spec": {
            "replicas": 1,  # the ledger ignores what it has, so a second relay would only repeat the work
            "revisionHistoryLimit": 3,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": reserve_disk(pod)},
        },
    }


def _ledger(spec: Spec) -> Object:
    return from_secret("INFERCTL_METERING_LEDGER", spec.deploy.ledger_secret, LEDGER_KEY)
