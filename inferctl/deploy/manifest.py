"""Writes Kubernetes objects as YAML, with the origin of each derived number in a comment next to it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from inferctl.deploy.figure import Noted

HEADER = "# Written by `inferctl deploy`. Change inferctl.yaml or clusters.yaml and run it again.\n"
# Kubernetes reads YAML 1.1, where `on` and `y` are booleans, `1_000` is a number and `12:30` is a number in base 60.
_AMBIGUOUS = re.compile(
    r"(?i:y|n|yes|no|on|off|true|false|null|~|)|[-+]?\.?\d.*|(?i:[-+]?\.(?:inf|nan))|.*\s", re.DOTALL
)


def dump(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return `objects` as a YAML stream, in their order and with the keys in theirs.

    A value of type `Noted` becomes its plain value, with its note as a comment at the end of the line.
    """
    return HEADER + "---\n".join(_document(each) for each in objects)


def plain(value: Any) -> Any:
    """Return `value` as dicts, lists and scalars, without notes."""
    if isinstance(value, Noted):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _document(value: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    _writer().dump(_commented(value), stream)
    return stream.getvalue()


@cache
def _writer() -> YAML:
    writer = YAML()
    writer.width = 4096  # a folded line would lose its comment
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.representer.add_representer(type(None), _null)
    return writer


def _null(representer: Any, _: None) -> Any:
    """Write `null` in full: in a patch, it removes a key, and an empty value looks like a mistake."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _commented(value: Any) -> Any:
    if isinstance(value, Mapping):
        found = CommentedMap()
        for key, inner in value.items():
            found[_text(key)] = _commented(inner)
            _note(found, inner, key)
        return found
    if isinstance(value, list | tuple):
        items = CommentedSeq()
        for index, inner in enumerate(value):
            items.append(_commented(inner))
            _note(items, inner, index)
        return items
    if isinstance(value, Noted):
        return _commented(value.value)
    return _text(value) if isinstance(value, str) else value


def _note(parent: CommentedMap | CommentedSeq, value: Any, key: Any) -> None:
    if isinstance(value, Noted):
        parent.yaml_add_eol_comment(" ".join(value.note.split()), key, column=0)


def _text(value: str) -> str:
    if "\n" in value:
        literal: str = LiteralScalarString(value)
        return literal
    quoted: str = DoubleQuotedScalarString(value) if _AMBIGUOUS.fullmatch(value) else value
    return quoted
