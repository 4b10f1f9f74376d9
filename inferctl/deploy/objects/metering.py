"""Usage events: their outbox, and what the relay of a server needs."""

from __future__ import annotations

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size
from inferctl.deploy.endpoints import SCHEME_PORTS, Endpoint, endpoints
from inferctl.deploy.objects.containers import empty
from inferctl.deploy.objects.metadata import Object, from_secret

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
    if not deploy.ledger_secret:
        raise UsageError("metering.mode is on, but nothing stores the usage events", "set deploy.ledger_secret")


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
    """Return the settings of the relay of a server."""
    if spec.metering.mode == "off":
        return []
    return [from_secret("INFERCTL_METERING_LEDGER", spec.deploy.ledger_secret, LEDGER_KEY)]


def egress(spec: Spec) -> list[Endpoint]:
    """Return what the relay of a server connects to for usage events.

    Only the Secret has the whole URL of the ledger; without `metering.ledger`, it is anywhere.
    """
    if spec.metering.mode == "off":
        return []
    address = spec.metering.ledger
    if address and not address.is_file:
        return endpoints(address.public, spec.deploy.namespace)
    return [Endpoint(SCHEME_PORTS["postgresql"], None)]
