"""Names and labels that all objects of one deployment share.

The labels of a pod say which model it serves (`app.kubernetes.io/name`), what it does
(`app.kubernetes.io/component`) and on which flavor of hardware (`inferctl.io/flavor`). Selectors use only these three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferctl.deploy.figure import Noted
from inferctl.manifests.label_keys import COMPONENT, FLAVOR, NAME

Object = dict[str, Any]

PART_OF = {"app.kubernetes.io/part-of": "inferctl", "app.kubernetes.io/managed-by": "inferctl"}
# A namespace with this label, set to "true", may send requests.
CLIENTS = "inferctl.io/clients"
NAMESPACE_NAME = "kubernetes.io/metadata.name"
# Component of the pods that serve the model.
SERVER = "server"
BENCH = "bench"
EMBED = "embed"
HTTP_PORT = "http"


def metadata(
    name: str, namespace: str | None, labels: Mapping[str, str], annotations: Mapping[str, str | Noted] | None = None
) -> Object:
    """Return the metadata of an object. `namespace`: None for an object of the whole cluster.

    Kustomize adds the labels `PART_OF`.
    """
    found: Object = {"name": name}
    if namespace:
        found["namespace"] = namespace
    if labels:
        found["labels"] = dict(labels)
    if annotations:
        found["annotations"] = dict(annotations)
    return found


def labels_of(model: str, component: str, flavor: str | None = None) -> dict[str, str]:
    """Return the labels that select pods of `model`: those of one component, and of one flavor if it is given."""
    found = {NAME: model, COMPONENT: component}
    return found | ({FLAVOR: flavor} if flavor else {})


def from_secret(variable: str, secret: str | None, key: str) -> Object:
    """Return an environment variable whose value is in a Secret."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
