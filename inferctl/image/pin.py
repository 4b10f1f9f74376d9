"""Pins a spec: writes the commit of its hub model and the digest of its base into the YAML file.

The file keeps its comments, order and quotes. Each edit replaces one value or inserts one line, and the result is
parsed and checked. A YAML library that writes whole documents would change indentation and quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import InferctlError, SpecError, UsageError
from inferctl.facts.catalog import BaseImage
from inferctl.models.image_source import is_image
from inferctl.models.model import is_hub_id

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./:@+-]*")
MODEL, MODEL_IMAGE, BASE = "model.revision", "model.source", "image.base_image"
# Key -> the key below which it is inserted.
_AFTER = {"revision": "source", "base_image": "base"}
_BLOCK = ("|", ">")


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

    Raises `UsageError` if the YAML style of the file prevents the edit.
    """
    before = settings.parse(text, file).data
    edited, expected = text, dict(before)
    for path, value in changes.items():
        section, key = path.split(".")
        expected[section] = {**(expected.get(section) or {}), key: value}
    try:
        for path, value in changes.items():
            edited = _set(edited, *path.split("."), value=value, file=file)
        correct = settings.parse(edited, file).data == expected
    except (yaml.YAMLError, SpecError):
        correct = False
    if not correct:
        raise _not_editable(file, " and ".join(changes))
    return edited


def _set(text: str, section: str, key: str, *, value: str, file: str) -> str:
    """Return `text` with `value` for `section.key`: replaced, inserted into the section, or in a new section."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    newline = "\r\n" if "\r\n" in text else "\n"
    # YAML would read a commit of digits only as a number.
    scalar_text = value if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value else f'"{value}"'
    assert isinstance(root, yaml.MappingNode)
    found = _child(root, section)
    if found is None:
        if root.flow_style:
            return _insert_flow(text, root, section, f"{{{key}: {scalar_text}}}")
        return _append(text, root, f"{section}:{newline}  {key}: {scalar_text}", newline)
    name, inner = found
    if inner.start_mark.index < name.end_mark.index or not isinstance(inner, yaml.MappingNode | yaml.ScalarNode):
        raise _not_editable(file, f"{section}.{key}")  # an alias: the anchored value is used elsewhere too
    if isinstance(inner, yaml.ScalarNode):  # `image:` without a value
        at = text.index(":", name.end_mark.index) + 1
        return f"{text[:at]} {{{key}: {scalar_text}}}{text[max(at, inner.end_mark.index) :]}"
    old = _child(inner, key)
    if old is not None:
        label, scalar = old
        if (
            scalar.start_mark.index < label.end_mark.index
            or not isinstance(scalar, yaml.ScalarNode)
            or (scalar.style in _BLOCK)
        ):
            raise _not_editable(file, f"{section}.{key}")
        start, end = scalar.start_mark.index, scalar.end_mark.index
        if start == end:  # `revision:` without a value
            start = end = text.index(":", label.end_mark.index) + 1
            scalar_text = f" {scalar_text}"
        return text[:start] + scalar_text + text[end:]
    if inner.flow_style:
        return _insert_flow(text, inner, key, scalar_text)
    neighbor = _child(inner, _AFTER[key])
    if neighbor and isinstance(neighbor[1], yaml.ScalarNode) and neighbor[1].style not in _BLOCK:
        line_end = re.compile(r"\r?$", re.MULTILINE).search(text, neighbor[1].end_mark.index)
        assert line_end is not None
        indent = " " * neighbor[0].start_mark.column
        return f"{text[: line_end.start()]}{newline}{indent}{key}: {scalar_text}{text[line_end.start() :]}"
    first = inner.value[0][0].start_mark
    return f"{text[: first.index]}{key}: {scalar_text}{newline}{' ' * first.column}{text[first.index :]}"


def _child(node: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the nodes of `key` and its value, None if the mapping has no such key."""
    return next(((name, value) for name, value in node.value if name.value == key), None)


def _insert_flow(text: str, node: yaml.MappingNode, key: str, value: str) -> str:
    """Return `text` with `key: value` as the first entry of a mapping in braces."""
    at = text.index("{", node.start_mark.index) + 1
    return f"{text[:at]}{key}: {value}{', ' if node.value else ''}{text[at:]}"


def _append(text: str, root: yaml.MappingNode, entry: str, newline: str) -> str:
    """Return `text` with `entry` after its last line, before a document end marker."""
    end = re.search(r"^\.\.\.\s*$", text, re.MULTILINE)
    head, tail = (text[: end.start()], text[end.start() :]) if end else (text, "")
    if head and not head.endswith(("\n", "\r\n")):
        head += newline
    return f"{head}{entry}{newline}{tail}"


def _not_editable(file: str, path: str) -> InferctlError:
    return UsageError(f"{file}: inferctl cannot edit {path} in this YAML style", f"set {path} in the file yourself")
