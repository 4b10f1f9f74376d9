"""What connects to the NATS server of usage events and limits. `nats.py` writes one."""

from __future__ import annotations

from collections.abc import Mapping

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy.endpoints import Endpoint, broker_address, endpoints, events_broker, limits_broker
from inferctl.deploy.objects.metadata import Object, from_secret

# Keys of the Secret: the URL of a given broker; passwords of the one that is written.
URL_KEY, PASSWORD_KEY = "url", "password"
# The user of the clients of the one that is written.
USER = "inferctl"
EVENTS, LIMITS = "INFERCTL_METERING_BROKER", "INFERCTL_ACCESS_BROKER"
_PASSWORD = "NATS_PASSWORD"


def check(spec: Spec) -> None:
    """Raise `UsageError` for a URL with credentials, and for settings of a broker that nothing uses."""
    if limits_broker(spec) and not broker_address(spec) and spec.access.broker and spec.access.broker.hidden:
        raise UsageError(
            f"{spec.name}: access.broker has credentials, which everyone who reads the manifests would see",
            "set deploy.broker to the address without them, and deploy.broker_secret to a Secret with the whole URL",
        )
    given = "nats" if spec.deploy.nats.storage else "broker_secret" if spec.deploy.broker_secret else None
    if given and not (events_broker(spec) or limits_broker(spec)):
        raise UsageError(
            f"{spec.name}: deploy.{given} is set, but nothing uses a broker",
            f"set metering.mode (usage events) or access.broker (limits), or remove deploy.{given}",
        )


def variables(spec: Spec, urls: Mapping[str, str | None]) -> list[Object]:
    """Return environment variables with URLs: from the Secret, or as they are if NATS asks for no credentials.

    `urls`: name of the variable -> URL without credentials; None: it is left out.
    """
    found = {name: url for name, url in urls.items() if url}
    secret = spec.deploy.broker_secret
    if found and spec.deploy.nats.storage:
        # Kubernetes replaces $(NAME) with the value of an earlier variable.
        return [
            from_secret(_PASSWORD, secret, PASSWORD_KEY),
            *({"name": name, "value": url.replace("://", f"://{USER}:$({_PASSWORD})@")} for name, url in found.items()),
        ]
    return [
        from_secret(name, secret, URL_KEY) if secret else {"name": name, "value": url} for name, url in found.items()
    ]


def egress(spec: Spec, namespace: str) -> list[Endpoint]:
    """Return what the relay of a server connects to."""
    return [each for url in (events_broker(spec), limits_broker(spec)) if url for each in endpoints(url, namespace)]
