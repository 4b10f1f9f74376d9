"""The relay next to each server: it stores usage events, copies keys of a database and exchanges limits."""

from __future__ import annotations

from inferctl.config.spec import Spec
from inferctl.deploy.objects import access, broker, metering
from inferctl.deploy.objects.containers import container_security, resources
from inferctl.deploy.objects.metadata import Object
from inferctl.deploy.sizing import relay_cores

RELAY = "relay"
_MEMORY = "256Mi"


def sidecars(spec: Spec) -> list[Object]:
    """Return the relay of a server. It starts before the server and ends after it, so it stores the last events."""
    if not (cores := relay_cores(spec)):
        return []
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
                *broker.variables(spec, broker.EVENTS, broker.LIMITS),
            ],
            "resources": resources(f"{cores * 1000:g}m", _MEMORY),
            "securityContext": container_security(),
            **access.relay_probe(spec),
            "volumeMounts": mounts,
        }
    ]
