"""Writes Kubernetes objects as YAML, with the origin of each derived number in a comment next to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from inferctl.deploy.figure import Noted

HEADER = "# Written by `inferctl deploy`. Change inferctl.yaml or clusters.yaml and run it again.\n"
# Kubernetes reads YAML 1.1, where `on` and `y` are booleans, `1_000` is a number and `12:30` is a number in base 60.
_AMBIGUOUS = re.compile(
    r"(?i:y|n|yes|no|on|off|true|false|null|~|)|[-+]?\.?\d.*|(?i:[-+]?\.(?:inf|nan))|.*\s", re.DOTALL
)
# Of a collection that is written on one line.
_LONGEST_LINE = 90
# Line breaks of YAML besides `\n`.
_OTHER_BREAKS = re.compile(r"[\r\x85\u2028\u2029]")
# libyaml is many times faster, but some builds of PyYAML do not contain it.
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def dump(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return `objects` as a YAML stream, in their order and with the keys in theirs.

    A value of type `Noted` becomes its plain value, with its note as a comment at the end of the line.
    """
    return HEADER + "---\n".join(document(each) for each in objects)


def document(value: Mapping[str, Any]) -> str:
    """Return one object, or a patch of a kustomization, as YAML. `dump` describes the comments."""
    # A folded line would lose its comment.
    text: str = yaml.dump(value, Dumper=_Dumper, width=2**30, sort_keys=False, allow_unicode=True)
    if not _has_note(value):
        return text
    lines = text.split("\n")
    for number, note in _notes(value, yaml.compose(text, Loader=_SafeLoader)):
        lines[number] += f" # {' '.join(note.split())}"
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return `value` as dicts, lists and scalars, without notes."""
    if isinstance(value, Noted):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _has_note(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_note, value.values()))
    return isinstance(value, Noted) or (isinstance(value, list | tuple) and any(map(_has_note, value)))


def _notes(value: Any, node: Any) -> Iterator[tuple[int, str]]:
    """Yield the line of each noted value, from 0, and its note. `node` is what `value` was written as."""
    if isinstance(value, Noted):
        yield node.start_mark.line, value.note
    elif isinstance(value, Mapping):
        for inner, (_, written) in zip(value.values(), node.value, strict=True):
            yield from _notes(inner, written)
    elif isinstance(value, list | tuple):
        for inner, written in zip(value, node.value, strict=True):
            yield from _notes(inner, written)


class _Dumper(_SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        return _short(super().represent_mapping(tag, mapping, flow_style), mapping.values())

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return _short(super().represent_sequence(tag, sequence, flow_style), sequence)


def _short(node: Any, values: Iterable[Any]) -> Any:
    """Return a node of a collection, on one line if it is short, has no other collection, and no comment."""
    scalars = [each for entry in node.value for each in (entry if isinstance(entry, tuple) else (entry,))]
    plain = all(isinstance(each, yaml.ScalarNode) and each.style != "|" for each in scalars)
    node.flow_style = (
        plain
        and not any(isinstance(value, Noted) for value in values)
        and sum(len(each.value) + 2 for each in scalars) <= _LONGEST_LINE
    )
    return node


def _represent_text(dumper: Any, value: str) -> Any:
    # Double quotes escape all breaks, so that a line of YAML ends where `_document` expects it.
    style = '"' if _OTHER_BREAKS.search(value) or ("\n" not in value and _AMBIGUOUS.fullmatch(value)) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style or ("|" if "\n" in value else None))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Noted, lambda dumper, noted: dumper.represent_data(noted.value))
