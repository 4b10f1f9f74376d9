"""Pins of a spec: the commit of its hub model and the digest of its base, written into the YAML file as single edits.

The file keeps its comments, order and quotes: an edit replaces one value or inserts one line, and what the result means
is read again before it counts. A YAML library that writes whole documents would change indentation and quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from inferctl import settings
from inferctl.catalog import BaseImage
from inferctl.errors import InferctlError, SpecError, UsageError
from inferctl.model import is_hub_id
from inferctl.spec import Spec

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./:@+-]*")
MODEL, BASE = "model.revision", "image.base_image"
# A new key goes below this one.
_AFTER = {"revision": "source", "base_image": "base"}
_BLOCK = ("|", ">")


@dataclass(frozen=True)
class Pin:
    """One setting that fixes what is built. `now` is what the spec says, None if it says nothing.

    `follows`: the image or the revision that a registry or hub resolves; None: the default branch of a model, or an
    image of which only the digest is known. `fixed` is the commit or the `name@digest` in force, None if there is none.
    """

    path: str
    now: str | None
    follows: str | None
    fixed: str | None

    @property
    def pinned(self) -> bool:
        """Whether what is built is fixed."""
        return self.fixed is not None

    def value(self, resolved: str) -> str:
        """What the spec has to say to fix `resolved`: a commit, or the digest of an image."""
        return resolved if self.path == MODEL else f"{self.follows}@{resolved}"


def pins(spec: Spec, base: BaseImage) -> list[Pin]:
    """What `spec` can pin. The digest that the catalog knows for a base counts as pinned."""
    found = []
    if is_hub_id(spec.model.source):
        revision = spec.model.revision
        fixed = revision if revision and _COMMIT.fullmatch(revision) else None
        # A commit does not say which branch it was on: the default branch shows whether there is something newer.
        found.append(Pin(MODEL, revision, None if fixed else revision, fixed))
    image = spec.image.base_image
    known = f"{base.reference}@{base.digest}" if base.digest and not image else image
    name, at, _ = (known or base.reference).partition("@")
    tagged = ":" in name.rpartition("/")[2]
    found.append(Pin(BASE, image, name if tagged or not at else None, known if at else None))
    return found


def edit(text: str, changes: Mapping[str, str], file: str) -> str:
    """`text` (a spec) with `changes` (dotted path of two keys -> value). Everything else stays as it is.

    Raises `UsageError` if the file is written in a way that this cannot edit.
    """
    before = settings.parse(text, file).data
    edited, expected = text, dict(before)
    for path, value in changes.items():
        section, key = path.split(".")
        expected[section] = {**(expected.get(section) or {}), key: value}
    try:
        for path, value in changes.items():
            edited = _set(edited, *path.split("."), value=value, file=file)
        same = settings.parse(edited, file).data == expected
    except (yaml.YAMLError, SpecError):
        same = False
    if not same:
        raise _cannot(file, " and ".join(changes))
    return edited


def _set(text: str, section: str, key: str, *, value: str, file: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    newline = "\r\n" if "\r\n" in text else "\n"
    # A commit of digits alone would be a number.
    written = value if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value else f'"{value}"'
    assert isinstance(root, yaml.MappingNode)
    found = _child(root, section)
    if found is None:
        if root.flow_style:
            return _insert_flow(text, root, section, f"{{{key}: {written}}}")
        return _append(text, root, f"{section}:{newline}  {key}: {written}", newline)
    name, inner = found
    if inner.start_mark.index < name.end_mark.index or not isinstance(inner, yaml.MappingNode | yaml.ScalarNode):
        raise _cannot(file, f"{section}.{key}")  # an alias: its anchor stands for other places too
    if isinstance(inner, yaml.ScalarNode):  # `image:` with nothing under it
        at = text.index(":", name.end_mark.index) + 1
        return f"{text[:at]} {{{key}: {written}}}{text[max(at, inner.end_mark.index) :]}"
    old = _child(inner, key)
    if old is not None:
        label, scalar = old
        if (
            scalar.start_mark.index < label.end_mark.index
            or not isinstance(scalar, yaml.ScalarNode)
            or (scalar.style in _BLOCK)
        ):
            raise _cannot(file, f"{section}.{key}")
        start, end = scalar.start_mark.index, scalar.end_mark.index
        if start == end:  # `revision:` with nothing after it
            start = end = text.index(":", label.end_mark.index) + 1
            written = f" {written}"
        return text[:start] + written + text[end:]
    if inner.flow_style:
        return _insert_flow(text, inner, key, written)
    neighbor = _child(inner, _AFTER[key])
    if neighbor and isinstance(neighbor[1], yaml.ScalarNode) and neighbor[1].style not in _BLOCK:
        line_end = re.compile(r"\r?$", re.MULTILINE).search(text, neighbor[1].end_mark.index)
        assert line_end is not None
        indent = " " * neighbor[0].start_mark.column
        return f"{text[: line_end.start()]}{newline}{indent}{key}: {written}{text[line_end.start() :]}"
    first = inner.value[0][0].start_mark
    return f"{text[: first.index]}{key}: {written}{newline}{' ' * first.column}{text[first.index :]}"


def _child(node: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((name, value) for name, value in node.value if name.value == key), None)


def _insert_flow(text: str, node: yaml.MappingNode, key: str, written: str) -> str:
    """`key: written` as the first entry of a mapping in braces."""
    at = text.index("{", node.start_mark.index) + 1
    return f"{text[:at]}{key}: {written}{', ' if node.value else ''}{text[at:]}"


def _append(text: str, root: yaml.MappingNode, entry: str, newline: str) -> str:
    """`entry` after the last line of the document, in front of an end marker."""
    end = re.search(r"^\.\.\.\s*$", text, re.MULTILINE)
    head, tail = (text[: end.start()], text[end.start() :]) if end else (text, "")
    if head and not head.endswith(("\n", "\r\n")):
        head += newline
    return f"{head}{entry}{newline}{tail}"


def _cannot(file: str, path: str) -> InferctlError:
    return UsageError(f"{file}: {path} cannot be edited as the file is written", "set it by hand, in plain YAML")
