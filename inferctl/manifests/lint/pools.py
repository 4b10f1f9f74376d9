"""InferencePools of the Gateway API, in v1 and before."""

from __future__ import annotations

from typing import Any

from inferctl.manifests.kubernetes.fields import mapping, text
from inferctl.manifests.manifests_file import Located

# The group before v1. Its selector was only labels, and the picker an extension.
_OLD_GROUP = "inference.networking.x-k8s.io/"


def selector(pool: Located) -> dict[str, Any]:
    """Return the label selector of the pods of a pool."""
    found = mapping(pool.data, "spec", "selector")
    return {"matchLabels": found} if pool.api_version.startswith(_OLD_GROUP) else found


def picker(pool: Located) -> tuple[str, str]:
    """Return the field that names the endpoint picker, and the name in it; "" if there is none."""
    field = "extensionRef" if pool.api_version.startswith(_OLD_GROUP) else "endpointPickerRef"
    return field, text(pool.data, "spec", field, "name")
