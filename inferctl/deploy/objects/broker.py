"""The servers of NATS that relays connect to, for limits and for usage events."""

from __future__ import annotations

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy.endpoints import Endpoint, endpoints, events_broker, limits_broker
from inferctl.deploy.objects.metadata import Object, from_secret

# Key of the Secret.
_URL_KEY = "url"
LIMITS, EVENTS = "access.broker", "metering.broker"


def check(spec: Spec) -> None:
    """Raise `UsageError` for URLs with credentials, and for a Secret that nothing uses or that has one URL for two."""
    used = _urls(spec)
    for name, address in ((LIMITS, spec.access.broker), (EVENTS, spec.metering.broker)):
        if name in used and address and address.hidden:
            raise UsageError(
                f"{spec.name}: {name} has credentials, which everyone who reads the manifests would see",
                "write it without them, and set deploy.broker_secret to a Secret with the whole URL",
            )
    if spec.deploy.broker_secret and len(set(used.values())) != 1:
        problem = f"{LIMITS} and {EVENTS} differ" if used else "nothing uses a broker"
        hint = f"set {EVENTS} with metering.mode, {LIMITS} with keys, or both to one address"
        raise UsageError(f"{spec.name}: deploy.broker_secret is set, but {problem}", hint)


def variables(spec: Spec, *names: str) -> list[Object]:
    """Return environment variables with URLs: from the Secret, or as they are if NATS asks for no credentials."""
    secret = spec.deploy.broker_secret
    found = {f"INFERCTL_{name.replace('.', '_').upper()}": url for name, url in _urls(spec).items() if name in names}
    return [
        from_secret(variable, secret, _URL_KEY) if secret else {"name": variable, "value": url}
        for variable, url in found.items()
    ]


def egress(spec: Spec, namespace: str) -> list[Endpoint]:
    """Return what the relay of a server connects to."""
    return [each for url in _urls(spec).values() for each in endpoints(url, namespace)]


def _urls(spec: Spec) -> dict[str, str]:
    """Return the URLs of brokers that are used, without credentials, by the name of their setting."""
    found = {LIMITS: limits_broker(spec), EVENTS: events_broker(spec)}
    return {name: url for name, url in found.items() if url}
