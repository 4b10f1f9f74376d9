"""Pins a spec: writes the commit of its hub model and the digest of its base into the YAML file.

The file keeps its comments, order and quotes. Each edit replaces the value in one line or inserts one, and the result
is parsed and checked. A YAML library that writes whole documents would change indentation and quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import SpecError, UsageError
from inferctl.facts.catalog import BaseImage
from inferctl.models.image_source import is_image
from inferctl.models.model import is_hub_id

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./:@+-]*")
MODEL, MODEL_IMAGE, BASE = "model.revision", "model.source", "image.base_image"
# Key -> the key below which it is inserted.
_AFTER = {"revision": "source", "base_image": "base"}


@dataclass(frozen=True)
class Pin:
    """One setting of a spec that can be pinned. `current` is its value in the spec, None if it is not set.

    `tracked`: the image or revision to resolve in a registry or hub. None stands for the default branch of a model, or
    for an image without a tag. `pinned_to`: the effective commit or `name@digest`, None if unpinned.
    """

    path: str
    current: str | None
    tracked: str | None
    pinned_to: str | None

    @property
    def pinned(self) -> bool:
        """Whether the setting is pinned."""
        return self.pinned_to is not None

    def value(self, resolved: str) -> str:
        """Return the value that pins the setting to `resolved`, which is a commit or an image digest."""
        return resolved if self.path == MODEL else f"{self.tracked}@{resolved}"


def pins(spec: Spec, base: BaseImage) -> list[Pin]:
    """Return the settings of `spec` that can be pinned. A base with a digest in the catalog is pinned."""
    if spec.models:
        raise UsageError("`inferctl pin` does not edit `models`", "set `revision`, or the digest of an `oci://` source")
    found = []
    if is_hub_id(spec.model.source):
        revision = spec.model.revision
        commit = revision if revision and _COMMIT.fullmatch(revision) else None
        # The branch of a commit is unknown, so updates come from the default branch.
        found.append(Pin(MODEL, revision, None if commit else revision, commit))
    elif is_image(source := spec.model.source):
        name, at, _ = source.partition("@")
        found.append(Pin(MODEL_IMAGE, source, name if _tagged(name) or not at else None, source if at else None))
    image = spec.image.base_image
    effective = f"{base.reference}@{base.digest}" if base.digest and not image else image
    name, at, _ = (effective or base.reference).partition("@")
    found.append(Pin(BASE, image, name if _tagged(name) or not at else None, effective if at else None))
    return found


def _tagged(name: str) -> bool:
    return ":" in name.rpartition("/")[2]


def edit(text: str, changes: Mapping[str, str], file: str) -> str:
    """Return `text` (a spec) with `changes` (dotted path of two keys -> value). Nothing else changes.

    Raises `UsageError` if a section or value is not on lines of its own.
    """
    edited, expected = text, dict(settings.parse(text, file).data)
    try:
        for path, value in changes.items():
            section, key = path.split(".")
            expected[section] = {**(expected.get(section) or {}), key: value}
            edited = _set(edited, section, key, value, file)
        correct = settings.parse(edited, file).data == expected
    except SpecError:
        correct = False
    if not correct:
        paths = " and ".join(changes)
        raise UsageError(
            f"{file}: inferctl cannot edit {paths} in this YAML style", f"set {paths} in the file yourself"
        )
    return edited


def _set(text: str, section: str, key: str, value: str, file: str) -> str:
    """Return `text` with `value` for `section.key`: replaced in its line, or on a new line. `edit` checks the result."""
    at = settings.parse(text, file).lines
    lines = text.splitlines(keepends=True)
    newline = "\r\n" if "\r\n" in text else "\n"
    # YAML would read a commit of digits only as a number.
    scalar = value if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value else f'"{value}"'
    if number := at.get((section, key)):
        old = rf"""^(\s*{key}:)[ \t]*(?:"[^"]*"|'[^']*'|[^\s#]*)"""
        lines[number - 1] = re.sub(old, lambda found: f"{found[1]} {scalar}", lines[number - 1])
        return "".join(lines)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += newline
    if (section,) not in at:
        return "".join([*lines, f"{section}:{newline}  {key}: {scalar}{newline}"])
    inner = [lines[number - 1] for path, number in at.items() if path[:1] == (section,) and len(path) == 2]
    indent = re.match(r"[ \t]*", inner[0])[0] if inner else "  "  # type: ignore[index]  # it matches every text
    lines.insert(at.get((section, _AFTER[key]), at[(section,)]), f"{indent}{key}: {scalar}{newline}")
    return "".join(lines)
