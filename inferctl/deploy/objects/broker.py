"""What connects to the NATS server of usage events and limits."""

from __future__ import annotations

from collections.abc import Mapping

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy.endpoints import Endpoint, endpoints, events_broker, limits_broker
from inferctl.deploy.objects.metadata import Object, from_secret

# Key of the Secret.
_URL_KEY = "url"
EVENTS, LIMITS = "INFERCTL_METERING_BROKER", "INFERCTL_ACCESS_BROKER"


def check(spec: Spec) -> None:
    """Raise `UsageError` for a URL with credentials, and for settings of a broker that nothing uses."""
    if limits_broker(spec) and not spec.deploy.broker and spec.access.broker and spec.access.broker.hidden:
        raise UsageError(
            f"{spec.name}: access.broker has credentials, which everyone who reads the manifests would see",
            "set deploy.broker to the address without them, and deploy.broker_secret to a Secret with the whole URL",
        )
    if spec.deploy.broker_secret and not (events_broker(spec) or limits_broker(spec)):
        raise UsageError(
            f"{spec.name}: deploy.broker_secret is set, but nothing uses a broker",
            "set metering.mode (usage events) or access.broker (limits), or remove deploy.broker_secret",
        )


def variables(spec: Spec, urls: Mapping[str, str | None]) -> list[Object]:
    """Return environment variables with URLs: from the Secret, or as they are if NATS asks for no credentials.

    `urls`: name of the variable -> URL without credentials; None: it is left out.
    """
    secret = spec.deploy.broker_secret
    return [
        from_secret(name, secret, _URL_KEY) if secret else {"name": name, "value": url}
        for name, url in urls.items()
        if url
    ]


def egress(spec: Spec, namespace: str) -> list[Endpoint]:
    """Return what the relay of a server connects to."""
    return [each for url in (events_broker(spec), limits_broker(spec)) if url for each in endpoints(url, namespace)]
