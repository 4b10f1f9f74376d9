"""Reads YAML files into plain data with the line number of every key. All YAML is read here.

A settings file is one mapping (`read`). A file of Kubernetes manifests has several documents (`read_all`).

A short file can expand to gigabytes, because aliases repeat the value that they name. The reader therefore checks the
size, the depth and the number of values, with aliases expanded, before it builds any data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inferctl.core.errors import Problem, SpecError, UsageError

MAX_BYTES = 1_000_000
# Levels of nesting. A spec has four, a plan has five.
MAX_DEPTH = 50
# Keys and values, with aliases expanded. The largest shipped file has a few hundred.
MAX_VALUES = 100_000

# The same for Kubernetes manifests: `kubectl get nodes -o yaml` of 500 nodes has 8 MB.
MAX_MANIFEST_BYTES = 16_000_000
MAX_MANIFEST_VALUES = 1_000_000
# Objects of a cluster as JSON: reading pods of 250 MB took 0.8 GB of memory. YAML, with its nodes and lines, takes
# about 70 times its size: 0.6 GB for 8 MB.
MAX_JSON_BYTES = 256_000_000

# libyaml is ten times as fast as the Python parser and does not recurse.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc]
    """A YAML loader with the integers of YAML 1.2 and without timestamps.

    An image tag such as 2024-02-30 stays text instead of an invalid date. 010 stays text instead of 8: a tag keeps its
    zero, and a port is 10, as with `--port 010`.
    """


class _ManifestLoader(_Parser):  # type: ignore[misc]
    """A YAML loader that reads scalars as kubectl does: 0400 is the octal 256, 1:30, dates and = are text."""


def _resolvers(patterns: Mapping[str, re.Pattern[str]], *dropped: str) -> dict[str, list[tuple[str, Any]]]:
    """Return what types plain scalars have by their first character: those of PyYAML, with other `patterns`."""
    return {
        first: [
            (tag, patterns.get(kind, pattern))
            for tag, pattern in resolvers
            if (kind := tag.rpartition(":")[2]) not in dropped
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_MANIFEST_INTEGER = re.compile(r"[-+]?(?:0b[01]+|0[0-7]+|0x[0-9a-fA-F]+|0|[1-9][0-9]*)$")
_MANIFEST_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = _resolvers({"int": _INTEGER}, "timestamp")
# PyYAML has a type for a bare =, and cannot read it. The resources of Prometheus have it as an operator.
_ManifestLoader.yaml_implicit_resolvers = _resolvers(
    {"int": _MANIFEST_INTEGER, "float": _MANIFEST_FLOAT}, "timestamp", "value"
)


def _bounded_integer(loader: Any, node: yaml.ScalarNode) -> int | float:
    """Return an integer; one of over 64 bits as the nearest float. Python cannot print one of 5,000 digits."""
    value = loader.construct_yaml_int(node)
    if value.bit_length() <= 64:
        return int(value)
    if value.bit_length() < 1024:
        return float(value)
    return math.inf if value > 0 else -math.inf


_ManifestLoader.add_constructor("tag:yaml.org,2002:int", _bounded_integer)
# JSON may write a character as two escapes, such as an emoji. YAML has one longer escape instead.
_ESCAPED_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_TEXT_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A YAML file as plain data, with the line (from 1) of each key and item: `lines[("serve", "port")] == 9`."""

    file: str
    data: dict[str, Any]
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)

    def line(self, path: Sequence[str | int]) -> int | None:
        """Return the line of `path`, or of its closest parent in the file. None if the file has neither."""
        for end in range(len(path), 0, -1):
            if (line := self.lines.get(tuple(path[:end]))) is not None:
                return line
        return None


def read(path: Path, example: str) -> Document:
    """Read a YAML file. `example` is the hint of an error: where to find a valid file.

    Raises `UsageError` if it cannot be read, `SpecError` if it is not a YAML mapping.
    """
    return parse(_text(path, MAX_BYTES, example), str(path), example)


def read_all(path: Path, example: str) -> list[Document]:
    """Read all documents of a file of Kubernetes manifests. Raises `UsageError` and `SpecError` like `read`."""
    return parse_all(_text(path, MAX_MANIFEST_BYTES, example), str(path), example)


def read_cluster(path: Path, example: str, smaller: str) -> list[Document]:
    """Read all documents of a file with objects of a cluster. `smaller` is the hint if it is too large.

    YAML has the limits of `read_all`. JSON may have 256 MB; above 1 MB, it is read without line numbers. Raises
    `UsageError` and `SpecError` like `read`.
    """
    text = _text(path, MAX_JSON_BYTES, example, smaller)
    if len(text) > MAX_BYTES and text[:100].lstrip().startswith("{"):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else error
            raise SpecError(str(path), [Problem("", f"not valid JSON: {what}", None, example)]) from None
        return [Document(str(path), data)]
    if len(text) > MAX_MANIFEST_BYTES:
        raise UsageError(f"{path} is larger than {MAX_MANIFEST_BYTES:,} bytes, the limit for YAML", smaller)
    return parse_all(text, str(path), example, smaller)


def parse(text: str, file: str, example: str) -> Document:
    """Parse YAML text. Raises `SpecError` for a syntax error, a repeated key, too many values, or no mapping."""
    try:
        _check_size(text, MAX_VALUES)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if isinstance(node, yaml.MappingNode) else None
        finally:
            loader.dispose()
    except _INVALID as error:
        raise SpecError(file, [_syntax_problem(error, example)]) from None
    if node is None:
        raise SpecError(file, [Problem("", "the file is empty", None, example)])
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(file, [Problem("", "expected `key: value` lines", node.start_mark.line + 1, example)])
    lines: dict[tuple[str | int, ...], int] = {}
    problems = list(_walk(node, (), lines))
    if problems:
        raise SpecError(file, problems)
    return Document(file, data or {}, lines)


def parse_all(text: str, file: str, example: str, smaller: str | None = None) -> list[Document]:
    """Parse the documents of Kubernetes manifests, without empty ones. Keys are text, as in JSON.

    Lines count from the start of the file; `lines[()]` is the first line of a document. Raises `SpecError`.
    """
    documents, problems = [], []
    if text.lstrip().startswith("{"):
        text = _ESCAPED_PAIR.sub(lambda pair: json.loads(f'"{pair[0]}"'), text)
    try:
        _check_size(text, MAX_MANIFEST_VALUES)
        loader = _ManifestLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                line = node.start_mark.line + 1
                if isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null"):
                    continue
                if not isinstance(node, yaml.MappingNode):
                    problems.append(Problem("", "expected a Kubernetes object (`key: value` lines)", line, example))
                    continue
                lines: dict[tuple[str | int, ...], int] = {(): line}
                found = list(_walk(node, (), lines))
                problems += found
                if not found:
                    _keys_as_text(node)
                    documents.append(Document(file, loader.construct_document(node), lines))
        finally:
            loader.dispose()
    except _INVALID as error:
        raise SpecError(file, [_syntax_problem(error, smaller or example)]) from None
    if problems:
        raise SpecError(file, problems)
    return documents


def scalar(text: str) -> Any:
    """Parse `text` as a YAML number, boolean, null or string. Return `text` itself if it is anything else."""
    try:
        node = yaml.compose(text, Loader=_Loader) if len(text) < 100 else None
        return yaml.load(text, Loader=_Loader) if isinstance(node, yaml.ScalarNode) else text
    except (yaml.YAMLError, ValueError):
        return text


def quoted(value: Any) -> str:
    """Return `value`, a string or a list of strings, as YAML on one line, in quotes where YAML requires them."""
    text: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip()[1:-1]


def block(value: Any) -> str:
    """Return `value` as YAML, with each key on a line of its own."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip()


def dotted(path: Sequence[Hashable]) -> str:
    """Join the keys of a path: `("serve", "port")` -> `serve.port`."""
    return ".".join(str(part) for part in path)


class _TooLargeError(yaml.MarkedYAMLError):
    pass


# PyYAML raises the last two for a tag that does not fit its value, such as `!!bool maybe`.
_INVALID = (yaml.YAMLError, ValueError, LookupError, AttributeError)


def _syntax_problem(error: Exception, example: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if isinstance(error, LookupError | AttributeError):
        what = "a tag does not fit its value"
    hint = example if isinstance(error, _TooLargeError) else "check the indentation and quotes on that line"
    return Problem("", f"not valid YAML: {what}", mark.line + 1 if mark else None, hint)


def _keys_as_text(node: yaml.Node) -> None:
    """Make the keys under `node` text, also those that YAML reads as numbers or booleans."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                key.tag = _TEXT_TAG
            _keys_as_text(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keys_as_text(item)


def _check_size(text: str, max_values: int) -> None:
    """Raise `_TooLargeError` if `text` is nested too deeply or has over `max_values` values with aliases expanded."""
    sizes: dict[str, int] = {}
    # For each open collection: its anchor, and the number of values before it.
    open_levels: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Parser):
        mark: Any = event.start_mark
        if isinstance(event, yaml.CollectionStartEvent):
            open_levels.append((event.anchor, total))
            total += 1
            if len(open_levels) > MAX_DEPTH:
                raise _TooLargeError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_levels.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if total > max_values:
            raise _TooLargeError(problem=f"more than {max_values:,} values with aliases expanded", problem_mark=mark)


def _walk(
    node: yaml.Node,
    path: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    parents: tuple[yaml.Node, ...] = (),
) -> Iterator[Problem]:
    """Fill `lines` with the line of each key and item under `node`; yield repeated keys and recursive aliases."""
    if node in parents:
        line = node.start_mark.line + 1
        yield Problem(
            dotted(path), f"{dotted(path)} contains itself", line, "remove the alias from the value that it refers to"
        )
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            key_path = (*path, str(key.value))
            line = key.start_mark.line + 1
            if key_path in lines:
                yield Problem(
                    dotted(key_path),
                    f"duplicate key {dotted(key_path)} (first on line {lines[key_path]})",
                    line,
                    "remove one of the two",
                )
            lines[key_path] = line
            yield from _walk(value, key_path, lines, (*parents, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            yield from _walk(item, (*path, index), lines, (*parents, node))


def _text(path: Path, max_bytes: int, example: str, smaller: str | None = None) -> str:
    """Return the content of `path`. Raises `UsageError` if it cannot be read, is not UTF-8 or is too large."""
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
        # Editors of Windows write a byte order mark.
        text = content[:max_bytes].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}", example) from None
    if len(content) > max_bytes:
        raise UsageError(f"{path} is larger than {max_bytes:,} bytes", smaller or example)
    return text


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return f"byte {error.start} is not UTF-8"
