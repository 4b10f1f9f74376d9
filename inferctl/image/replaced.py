"""What an image changes for stored vectors, compared with the image whose name it takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping

from inferctl.core.errors import InferctlError
from inferctl.image import registry
from inferctl.image.docker import DockerEngine
from inferctl.image.image_name import split
from inferctl.image.records import ImageInfo
from inferctl.image.render import NAMES_LABEL
from inferctl.models.fit import Finding

_EXECUTION = ("stack", "precision")  # what moves vectors within a space, of the labels


def findings(engine: DockerEngine, image: ImageInfo, reference: str, *, push: bool) -> list[Finding]:
    """Return a warning for each model whose space or execution differs from that of the image `reference`.

    With `push`, this is the image in the registry. Empty if there is none, or if no space is known of one of them.
    """
    new = spaces(image.labels)
    if not new:
        return []
    old_name, labels = "", {}
    with contextlib.suppress(InferctlError):  # there is none; what else is wrong with a registry, the push says
        if push:
            old_name = f"{split(reference)[0]}@{registry.digest(reference)}"
            labels = dict(registry.remote_image(old_name, image.platform).labels)
        elif found := engine.image(reference):
            old_name, labels = found.id, dict(found.labels)
    return compare(labels, image.labels, f"inferctl space diff {old_name} {reference}")


def compare(old: Mapping[str, str], new: Mapping[str, str], command: str) -> list[Finding]:
    """Return the warnings about two images, by their labels. `command` measures how much a change matters."""
    before, after, found = spaces(old), spaces(new), []
    for name in (name for name in after if name in before and before[name] != after[name]):
        what = f"{name + ': ' if name else ''}the vector space changes from {before[name]} to {after[name]}"
        why = "vectors that are stored from the image with this name before are of another space"
        run = command + (f" --served-model {name}" if name else "")
        found.append(Finding("warn", "space", what, why, f"embed them again unless `{run}` says not needed"))
    keys = [f"io.inferctl.{key}" for key in _EXECUTION]
    changed = [f"{old[key]} -> {new[key]}" for key in keys if key in old and key in new and old[key] != new[key]]
    if changed and before and before == after:
        why = "how much this moves vectors within their space was not measured"
        found.append(Finding("warn", "space", f"the execution changes: {', '.join(changed)}", why, f"run `{command}`"))
    return found


def spaces(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the spaces of each model of an image by its name, which is empty for the only one."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        listed = [
            {"name": "", "space": labels.get("io.inferctl.model.space")},
            *json.loads(labels.get(NAMES_LABEL, "[]")),
        ]
        return {each["name"]: each["space"] for each in listed if each.get("space")}
    return {}
