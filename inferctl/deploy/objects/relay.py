"""The relay next to each server: it stores usage events, copies keys of a database and exchanges limits."""

from __future__ import annotations

from inferctl.config.spec import Spec
from inferctl.deploy.objects import access, broker, metering
from inferctl.deploy.objects.containers import container_security, resources
from inferctl.deploy.objects.metadata import Object

RELAY = "relay"
_MEMORY = "256Mi"
# With less, the relay needs ten seconds for its imports, and a server waits for its keys.
_CORES, _CORES_WITH_ACCESS = 0.1, 0.25


def cores(spec: Spec) -> float:
    """Return the cores of the relay, 0 without one."""
    if spec.access.has_relay:
        return _CORES_WITH_ACCESS
    return _CORES if spec.metering.mode != "off" else 0.0


def sidecars(spec: Spec) -> list[Object]:
    """Return the relay of a server. It starts before the server and ends after it, so it stores the last events."""
    if not cores(spec):
        return []
    urls = {broker.EVENTS: broker.of_events(spec), broker.LIMITS: broker.of_limits(spec)}
    mounts = [mount for _, mount in (*metering.volumes(spec), *access.data_volumes(spec))]
    return [
        {
            "name": RELAY,
            "image": spec.deploy.tools_image,
            "imagePullPolicy": "IfNotPresent",
            "restartPolicy": "Always",
            "command": ["inferctl", "relay", *metering.relay_options(spec)],
            "env": [
                *metering.relay_environment(spec),
                *access.relay_environment(spec),
                *broker.variables(spec, urls),
            ],
            "resources": resources(f"{cores(spec) * 1000:g}m", _MEMORY),
            "securityContext": container_security(),
            **access.relay_probe(spec),
            "volumeMounts": mounts,
        }
    ]
