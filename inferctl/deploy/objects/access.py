"""Keys of servers, from a file or a database, and the limits that servers share through a broker.

A server asks neither a database nor a broker. Its relay copies the keys into a folder that both mount, and passes
counters of limits on through a socket there.
"""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy.endpoints import Endpoint, endpoints, limits_broker
from inferctl.deploy.objects import broker
from inferctl.deploy.objects.containers import empty
from inferctl.deploy.objects.metadata import Object, from_secret
from inferctl.image.render import KEYS_PATH

DATA = "/access"
KEYS_FILE = "keys.json"
# Key of the Secret with the URL of the database.
URL_KEY = "url"
_KEYS_VOLUME, _DATA_VOLUME = "keys", "access"
# A server only needs to know that there is a broker.
_THROUGH_RELAY = "nats://relay"
# A key is about 300 bytes. While the copy is replaced, there are two.
_DATA_SIZE = "64Mi"
_STARTED_S = 600


def check(spec: Spec) -> None:
    """Raise `UsageError` if the pods could not reach the database with the keys, or if they have no relay."""
    broker.check(spec)
    if store := spec.access.key_store:
        if store.is_file:
            raise UsageError(
                f"{spec.name}: access.keys is SQLite, a file of one machine, which pods on several nodes cannot share",
                "use PostgreSQL, or a key file (access.keys: keys.json) with deploy.keys_secret",
            )
        if _is_socket(store.public):
            raise UsageError(f"{spec.name}: access.keys names a Unix socket, which pods lack", "name a host in the URL")
    if spec.access.has_relay and not spec.deploy.tools_image:
        what = "keys in a database require" if spec.access.key_store else "access.broker requires"
        raise UsageError(
            f"{spec.name}: {what} a relay in each pod, and images of servers do not contain it",
            "set deploy.tools_image to an image with `inferctl[ledger,broker]`",
        )


def environment(spec: Spec) -> dict[str, str]:
    """Return the settings of the server."""
    if not spec.access.required:
        return {}
    # Prometheus has no key. The network policies say who reaches the port.
    found = {"INFERCTL_ACCESS_OPEN": ",".join(sorted({*spec.access.open, "metrics"}))}
    if spec.access.public_key_store:
        # The file that the relay writes has a hash of the URL in its name. The server connects to nothing.
        found["INFERCTL_ACCESS_KEYS"] = spec.access.public_key_store
    elif spec.access.keys:
        found["INFERCTL_ACCESS_KEYS"] = f"{KEYS_PATH}/{KEYS_FILE}"
    if spec.access.has_relay:
        found["INFERCTL_ACCESS_DATA"] = DATA
    if limits_broker(spec):
        found["INFERCTL_ACCESS_BROKER"] = _THROUGH_RELAY
    if spec.access.budgets:  # the image can be older
        found["INFERCTL_ACCESS_BUDGETS"] = json.dumps(spec.access.budgets)
        if spec.metering.prices:
            found["INFERCTL_METERING_PRICES"] = f"{KEYS_PATH}/{Path(spec.metering.prices).name}"
    return found


def volumes(spec: Spec) -> list[tuple[Object, Object]]:
    """Return the volumes of a server with their mounts: the Secret (key file, prices), the folder of the relay."""
    found, prices = [], spec.metering.prices
    if spec.access.keys and (prices or not spec.access.key_store):
        secret: Object = {"secretName": spec.deploy.keys_secret, "defaultMode": 0o440}
        if prices and spec.access.key_store:  # without its URL
            name = Path(prices).name
            secret |= {"items": [{"key": name, "path": name}], "optional": True}
        mount = {"name": _KEYS_VOLUME, "mountPath": KEYS_PATH, "readOnly": True}
        found.append(({"name": _KEYS_VOLUME, "secret": secret}, mount))
    return found + data_volumes(spec)


def data_volumes(spec: Spec) -> list[tuple[Object, Object]]:
    """Return the folder that a server shares with its relay, with its mount. It ends with the pod."""
    return [empty(_DATA_VOLUME, DATA, _DATA_SIZE)] if spec.access.has_relay else []


def relay_environment(spec: Spec) -> list[Object]:
    """Return the settings of the relay, without those of the broker."""
    if not spec.access.has_relay:
        return []
    found: list[Object] = [{"name": "INFERCTL_ACCESS_DATA", "value": DATA}]
    if spec.access.key_store:
        found.append(from_secret("INFERCTL_ACCESS_KEYS", spec.deploy.keys_secret, URL_KEY))
    else:
        # The relay reads no key file, but has nothing to do for servers that ask for no keys.
        found.append({"name": "INFERCTL_ACCESS_KEYS", "value": f"{KEYS_PATH}/{KEYS_FILE}"})
    return found


def relay_probe(spec: Spec) -> Object:
    """Return the startup probe of the relay, after which the server starts: there is a copy of the keys.

    Without it, servers that start during an outage of the database would load their model again and again. Keys that
    were copied once stay in use, so later outages do not matter.
    """
    if not spec.access.key_store:
        return {}
    # The server looks for the same name, because the hash is of the URL without its password.
    copy = spec.access.model_copy(update={"data": DATA}).key_file
    # The message is an event of the pod (`kubectl describe`).
    script = (
        f"test -s {copy} || {{ echo 'no copy of the keys yet: see the log of this container; the URL in the "
        "Secret must be access.keys of the spec, with the password'; exit 1; }"
    )
    probe = {"exec": {"command": ["/bin/sh", "-c", script]}, "timeoutSeconds": 5, "periodSeconds": 1}
    return {"startupProbe": {**probe, "failureThreshold": _STARTED_S}}


def egress(spec: Spec, namespace: str) -> list[Endpoint]:
    """Return what the relay connects to for keys. `broker.egress` has the broker."""
    return endpoints(spec.access.public_key_store, namespace) if spec.access.public_key_store else []


def _is_socket(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    hosts = urllib.parse.parse_qs(parts.query).get("host", [])
    return any(host.startswith("/") for host in hosts) or (not parts.hostname and not hosts)
