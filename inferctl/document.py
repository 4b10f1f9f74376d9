"""YAML files that people write -> plain data with the line of every key. The one reader of YAML; its input is bounded.

A short file can stand for gigabytes: aliases multiply what they name. Size, depth and what aliases expand to are
counted before anything is built.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inferctl.errors import Problem, SpecError, UsageError

MAX_BYTES = 1_000_000
# Levels of nesting; a spec has four, a plan five.
MAX_DEPTH = 50
# Keys and values after aliases are expanded. The largest shipped file has a few hundred.
MAX_VALUES = 100_000

# libyaml is ten times as fast, and its parser does not recurse.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc]
    """YAML without timestamps: a tag like 2024-02-30 is a text, not a date (and not an error)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Document:
    """A YAML file as plain data, with the line (from 1) of every key and item: `lines[("serve", "port")] == 9`."""

    file: str
    data: dict[str, Any]
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)

    def line(self, path: Sequence[str | int]) -> int | None:
        """Line of `path`, or of its closest parent that the file mentions."""
        for end in range(len(path), 0, -1):
            if (line := self.lines.get(tuple(path[:end]))) is not None:
                return line
        return None


def read(path: Path, example: str) -> Document:
    """Read a YAML file. `example` is the hint of an error: where to find a right one.

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
    """YAML text -> `Document`. Raises `SpecError` for bad syntax, repeated keys, too many values, and no mapping."""
    try:
        _refuse_too_much(text)
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
        if isinstance(error, _TooMuchError):
            hint = example
        line = mark.line + 1 if mark else None
        raise SpecError(file, [Problem("", f"not valid YAML: {what}", line, hint)]) from None
    if node is None:
        raise SpecError(file, [Problem("", "the file is empty", None, example)])
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(file, [Problem("", "expected `key: value` lines", node.start_mark.line + 1, example)])
    lines: dict[tuple[str | int, ...], int] = {}
    repeated = list(_walk(node, (), lines))
    if repeated:
        raise SpecError(file, repeated)
    return Document(file, data or {}, lines)


def scalar(text: str) -> Any:
    """The number, boolean, null or text that `text` is in YAML; `text` itself if it is anything else."""
    try:
        node = yaml.compose(text, Loader=_Loader) if len(text) < 100 else None
        return yaml.load(text, Loader=_Loader) if isinstance(node, yaml.ScalarNode) else text
    except (yaml.YAMLError, ValueError):
        return text


def quoted(value: Any) -> str:
    """`value`, a text or a list of texts, as YAML on one line, in quotes where YAML would read something else."""
    text: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip()[1:-1]


def dotted(path: Sequence[Hashable]) -> str:
    """`("serve", "port")` -> `serve.port`."""
    return ".".join(str(part) for part in path)


class _TooMuchError(yaml.MarkedYAMLError):
    pass


def _refuse_too_much(text: str) -> None:
    """Raise `_TooMuchError` for what is too deep, or too much once its aliases are expanded."""
    sizes: dict[str, int] = {}
    # For each level that is open: its anchor, and how many values it has so far.
    above: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Parser):
        mark: Any = event.start_mark
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, total))
            total += 1
            if len(above) > MAX_DEPTH:
                raise _TooMuchError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if total > MAX_VALUES:
            raise _TooMuchError(problem=f"more than {MAX_VALUES:,} values, aliases expanded", problem_mark=mark)


def _walk(
    node: yaml.Node,
    path: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    above: tuple[yaml.Node, ...] = (),
) -> Iterator[Problem]:
    if node in above:
        line = node.start_mark.line + 1
        yield Problem(
            dotted(path), f"{dotted(path)} contains itself", line, "an alias must not stand inside what it names"
        )
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                yield Problem(
                    dotted(here),
                    f"{dotted(here)} is given twice (first on line {lines[here]})",
                    line,
                    "keep one of the two",
                )
            lines[here] = line
            yield from _walk(value, here, lines, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            yield from _walk(item, (*path, index), lines, (*above, node))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return f"byte {error.start} is not UTF-8"
