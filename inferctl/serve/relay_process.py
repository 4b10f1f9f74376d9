"""Starts `python -m inferctl.tenancy.relay`, which does what no request may wait for, and restarts it if it ends.

It brings usage events to the ledger, copies the key store, and exchanges limits and revoked keys with other servers.

The relay may crash or hang at any time: the server writes its events to the outbox and never waits for the relay. The
end of stdin tells it to store what is left and to end, and the empty line before it that all events are recorded.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

from inferctl.config.spec import Spec
from inferctl.core.addresses import WITH_SECRETS
from inferctl.core.errors import install_hint
from inferctl.serve.child import Helper

log = logging.getLogger("inferctl.relay")


def start(spec: Spec, notify: Callable[[str], None]) -> Helper | None:
    """Return the relay of a server, None if it needs none. Its `run` starts it.

    `notify` gets the reason if the packages of the relay are not installed, as in images.
    """
    metering, access = spec.metering.mode != "off", spec.access.has_relay
    if not metering and not access:
        return None
    packages = {"sqlalchemy": "ledger", "alembic": "ledger"}
    if (metering and spec.metering.broker) or (access and spec.access.broker):
        packages["nats"] = "broker"
    missing = [name for name in ("inferctl.tenancy.relay", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        hint = "" if missing[0] == "inferctl.tenancy.relay" else f" ({install_hint(packages[missing[0]])})"
        waiting = [f"usage events stay in {spec.metering.data}"] if metering else []
        if access:
            waiting.append(f"keys and limits of other servers do not arrive in {spec.access.data}")
        what, options = " and ".join(waiting), f" --data {spec.metering.data}" if metering else ""
        notify(
            f"{what}, because the packages of the relay are missing{hint}; run `inferctl relay{options}` where they are"
        )
        return None
    settings = {"spec": spec.model_dump(mode="json", context=WITH_SECRETS)}
    return Helper("the relay", "inferctl.tenancy.relay", settings, log)
