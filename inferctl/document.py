"""Reads YAML files into plain data with the line number of every key. All YAML is read here.

A short file can expand to gigabytes, because aliases repeat the value that they name. The reader therefore checks the
size, the depth and the number of values, with aliases expanded, before it builds any data.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inferctl.errors import Problem, SpecError, UsageError

MAX_BYTES = 1_000_000
# Levels of nesting. A spec has four, a plan has five.
MAX_DEPTH = 50
# Keys and values, with aliases expanded. The largest shipped file has a few hundred.
MAX_VALUES = 100_000

# libyaml is ten times as fast as the Python parser and does not recurse.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc]
    """A YAML loader with the integers of YAML 1.2 and without timestamps.

    An image tag such as 2024-02-30 stays text instead of an invalid date. 010 stays text instead of 8: a tag keeps its
    zero, and a port is 10, as with `--port 010`.
    """


_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
        if not tag.endswith(":timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}", example) from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES:,} bytes", example)
    return parse(text, str(path), example)


def parse(text: str, file: str, example: str) -> Document:
    """Parse YAML text. Raises `SpecError` for a syntax error, a repeated key, too many values, or no mapping."""
    try:
        _check_size(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if isinstance(node, yaml.MappingNode) else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "check the indentation and quotes on that line"
        if isinstance(error, _TooLargeError):
            hint = example
        line = mark.line + 1 if mark else None
        raise SpecError(file, [Problem("", f"not valid YAML: {what}", line, hint)]) from None
    if node is None:
        raise SpecError(file, [Problem("", "the file is empty", None, example)])
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(file, [Problem("", "expected `key: value` lines", node.start_mark.line + 1, example)])
    lines: dict[tuple[str | int, ...], int] = {}
    problems = list(_walk(node, (), lines))
    if problems:
        raise SpecError(file, problems)
    return Document(file, data or {}, lines)


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


def dotted(path: Sequence[Hashable]) -> str:
    """Join the keys of a path: `("serve", "port")` -> `serve.port`."""
    return ".".join(str(part) for part in path)


class _TooLargeError(yaml.MarkedYAMLError):
    pass


def _check_size(text: str) -> None:
    """Raise `_TooLargeError` if `text` is nested too deeply or has too many values with aliases expanded."""
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
        if total > MAX_VALUES:
            raise _TooLargeError(problem=f"more than {MAX_VALUES:,} values with aliases expanded", problem_mark=mark)


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


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return f"byte {error.start} is not UTF-8"
