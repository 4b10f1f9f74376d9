"""`inferctl.yaml` -> `Spec`: every mistake at once, each with its line; and where each setting came from.

Settings come from four places, first one wins: command-line flag, `INFERCTL_*` environment variable, the spec file, the default.
`resolve` is the one pure function that knows this; nothing else reads the environment.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inferctl.errors import Problem, SpecError, UsageError

DEFAULT_FILE = "inferctl.yaml"
ENVIRONMENT_PREFIX = "INFERCTL_"
# Read by the command line or the tests rather than being a setting of the spec.
RESERVED_VARIABLES = frozenset({"INFERCTL_SPEC", "INFERCTL_REQUIRE"})

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Task = Literal["embed", "generate"]
Weights = Literal["mount", "bake", "download"]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)]
# What ends up in a Dockerfile or a label must stay on its line.
OneLine = Annotated[str, Field(pattern=r"^[^\r\n\x00]+$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """Which model, and how its weights reach the container."""

    source: OneLine = Field(
        description="Hub id (`org/name`) or a local folder with config.json and safetensors weights."
    )
    revision: OneLine | None = Field(
        None, description="Commit of a hub model; `inferctl build` refuses a floating one unless told."
    )
    task: Task = Field("embed", description="What the server does with it.")
    weights: Weights = Field(
        "mount",
        description="`mount`: a volume at /model. `bake`: a layer of the image. `download`: fetched when the container starts.",
    )


class Serve(_Section):
    """How the server runs. Every field can be overridden when it starts."""

    precision: Precision = Field(
        "auto", description="Number format of the forward pass; `auto` takes the best the hardware runs natively."
    )
    host: OneLine = Field("127.0.0.1", description="Address to listen on. In a container it is always 0.0.0.0.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_batch_tokens: int = Field(16384, ge=64, le=1_048_576, description="Tokens of one forward pass at most.")
    max_input_tokens: int | None = Field(
        None, ge=8, description="Tokens of one input at most; default is what the model was made for."
    )
    max_queue_tokens: int = Field(
        262_144, ge=64, description="Tokens waiting at most; beyond it the server answers 429."
    )
    max_client_batch: int = Field(2048, ge=1, le=65536, description="Inputs in one request at most.")
    drain_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, how long accepted requests may take to finish."
    )


class Image(_Section):
    """The container image."""

    repository: OneLine | None = Field(
        None, description="Where the image is pushed: `registry/namespace/name`, without a tag."
    )
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")] | None = Field(
        None, description="Default is `<precision>-<spec hash>`, so that equal specs get equal names."
    )
    base: OneLine = Field("cuda12.8", description="An entry of base-images/.")
    base_image: OneLine | None = Field(
        None, description="Your mirror of the base, best with a digest: `registry/cuda@sha256:...`."
    )
    platform: OneLine = Field("linux/amd64", description="Platform to build for.")
    wheels: OneLine | None = Field(
        None, description="Folder of wheels that stands in for the package index (air-gapped builds)."
    )
    locks: OneLine | None = Field(None, description="Folder with your own hashed locks, written by `inferctl lock`.")
    frontend: OneLine | None = Field(
        None,
        description="Dockerfile frontend to pull, as in `docker/dockerfile:1`. Default is the builder's own: air-gapped builders cannot pull.",
    )
    max_size: OneLine | None = Field(None, description="Refuse to build an image forecast to be larger, as in `6GB`.")


class Slo(_Section):
    """What must hold."""

    p99_ms: float | None = Field(None, gt=0, description="99th percentile of the request latency, milliseconds.")


class Bench(_Section):
    """What is measured by default."""

    plan: OneLine = Field("precision", description="An entry of benchmarks/plans/, or a YAML file.")


class Deploy(_Section):
    """Reserved for Kubernetes settings."""


class Spec(_Section):
    """One model container: what it serves, how it is built, what it must hold."""

    name: Slug = Field(
        description="Name of the model in the API and of the image: lower-case letters, digits, `-` and `.`."
    )
    model: Model
    serve: Serve = Field(default_factory=Serve)  # type: ignore[arg-type]  # pydantic fills the defaults
    image: Image = Field(default_factory=Image)  # type: ignore[arg-type]
    hardware: list[OneLine] = Field(
        default_factory=list, description="It must run on all of these: entries of benchmarks/hardware/."
    )
    slo: Slo = Field(default_factory=Slo)  # type: ignore[arg-type]
    bench: Bench = Field(default_factory=Bench)  # type: ignore[arg-type]
    deploy: Deploy = Field(default_factory=Deploy)

    def digest(self) -> str:
        """sha256 (hex) over the canonical JSON of every setting; equal specs have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def image_reference(self) -> str:
        """`repository:tag` of the built image; the repository defaults to `inferctl/<name>`."""
        return f"{self.image.repository or f'inferctl/{self.name}'}:{self.image.tag or f'{self.serve.precision}-{self.digest()[:12]}'}"


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


@dataclass(frozen=True)
class Resolved:
    """The settings in force. `origins` maps a dotted path to `flag --x`, `env INFERCTL_X`, `file.yaml:12` or `default`."""

    spec: Spec
    file: str | None
    origins: dict[str, str]
    warnings: list[str]


def read(path: Path) -> Document:
    """Read a spec file. Raises `UsageError` when there is none, `SpecError` when it is not a YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"there is no spec file {path}", "`inferctl init` writes one; `--spec FILE` names another"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a spec file", f"did you mean {path / DEFAULT_FILE}?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", "a spec is UTF-8 YAML; `inferctl init` writes an example"
        ) from None
    return parse(text, str(path))


def parse(text: str, file: str = DEFAULT_FILE) -> Document:
    """YAML text -> `Document`. Raises `SpecError` for bad syntax, repeated keys, or anything but a mapping."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark else None
        raise SpecError(
            file, [Problem("", f"not valid YAML: {what}", line, "check the indentation and quotes on that line")]
        ) from None
    if node is None:
        raise SpecError(
            file, [Problem("", "the file is empty", None, "`inferctl init --force` writes a commented example")]
        )
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(
            file,
            [
                Problem(
                    "",
                    "expected `key: value` lines",
                    node.start_mark.line + 1,
                    "`inferctl init` writes a commented example",
                )
            ],
        )
    lines: dict[tuple[str | int, ...], int] = {}
    repeated = list(_walk(node, (), lines))
    if repeated:
        raise SpecError(file, repeated)
    return Document(file, data, lines)


def _walk(node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> Iterator[Problem]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                yield Problem(
                    _dotted(here),
                    f"{_dotted(here)} is given twice (first on line {lines[here]})",
                    line,
                    "keep one of the two",
                )
            lines[here] = line
            yield from _walk(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            yield from _walk(item, (*path, index), lines)


def resolve(
    document: Document | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> Resolved:
    """Flags over environment over file over defaults, validated as a whole.

    `flags` maps dotted paths to values, None meaning not given. `vocabulary` maps dotted paths to the names the catalog knows there.
    Raises `SpecError` with all the mistakes.
    """
    known = settings()
    data: dict[str, Any] = json.loads(json.dumps(document.data, default=str)) if document else {}
    file = document.file if document else None
    origins = dict.fromkeys(known, "default")
    for path in known:
        if document and _get(data, path) is not _ABSENT:
            origins[path] = f"{file}:{document.line(path.split('.'))}"
    variables = {f"{ENVIRONMENT_PREFIX}{path.upper().replace('.', '_')}": path for path in known}
    warnings: list[str] = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        if variable not in variables:
            close = difflib.get_close_matches(variable, variables, 1)
            warnings.append(f"{variable} is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
            continue
        path = variables[variable]
        _put(data, path, _from_text(text, known[path]))
        origins[path] = f"env {variable}"
    for path, value in flags.items():
        if value is not None:
            _put(data, path, value)
            origins[path] = f"flag --{path.rsplit('.', 1)[-1].replace('_', '-')}"
    if "name" not in data and isinstance(source := _get(data, "model.source"), str):
        data["name"] = slug(source)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        problems = [_problem(dict(e), document, origins, data) for e in error.errors()]
        problems += _unknown_names(data, document, origins, vocabulary or {})
        raise SpecError(file or "settings", sorted(_without_union_noise(problems), key=lambda p: p.line or 0)) from None
    if problems := _unknown_names(data, document, origins, vocabulary or {}):
        raise SpecError(file or "settings", problems)
    return Resolved(spec, file, origins, warnings)


def settings() -> dict[str, Any]:
    """Dotted path of every setting -> its type annotation."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, info in section.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from walk(annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", annotation

    return dict(walk(Spec, ""))


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `inferctl.yaml`, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "inferctl.yaml",
        **Spec.model_json_schema(),
    }


def slug(source: str) -> str:
    """A valid `name` out of a hub id or a folder: `sentence-transformers/all-MiniLM-L6-v2` -> `all-minilm-l6-v2`."""
    last = source.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")[:63] or "model"


_ABSENT = object()


def _get(data: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(data, dict) or key not in data:
            return _ABSENT
        data = data[key]
    return data


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        inner = data.get(key)
        if not isinstance(inner, dict):
            inner = data[key] = {}
        data = inner
    data[last] = value


def _from_text(text: str, annotation: Any) -> Any:
    if typing.get_origin(annotation) is list and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _dotted(path: Sequence[Hashable]) -> str:
    return ".".join(str(part) for part in path)


def _section_fields(path: Sequence[str | int]) -> list[str]:
    section: Any = Spec
    for key in path:
        info = section.model_fields.get(str(key)) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if info is None:
            return []
        section = info.annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def did_you_mean(word: str, words: Sequence[str]) -> str | None:
    """`did you mean 'x'?` for the closest of `words`, or None when nothing is close."""
    close = difflib.get_close_matches(word, words, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None


def _where(path: str, document: Document | None, origins: Mapping[str, str]) -> tuple[str, int | None]:
    """How to name `path` in a message (with the flag or variable that set it, when one did), and its line in the file."""
    origin = origins.get(path, "")
    if origin.startswith(("flag ", "env ")):
        return f"{path} (from {origin.split(' ', 1)[1]})", None
    return path, document.line(tuple(int(p) if p.isdigit() else p for p in path.split("."))) if document else None


def _problem(
    error: dict[str, Any], document: Document | None, origins: Mapping[str, str], data: dict[str, Any]
) -> Problem:
    location = [
        part for part in error["loc"] if not (isinstance(part, str) and part.startswith(("function-", "constrained-")))
    ]
    path, kind, value = _dotted(location), error["type"], error.get("input")
    label, line = _where(path, document, origins)
    if kind == "extra_forbidden":
        siblings = _section_fields(location[:-1])
        where = f" in {_dotted(location[:-1])}" if location[:-1] else ""
        hint = did_you_mean(str(location[-1]), siblings) or (
            f"known{where}: {', '.join(siblings)}" if siblings else "this section takes no keys yet"
        )
        return Problem(path, f"unknown key {str(location[-1])!r}{where}", line, hint)
    if kind == "missing":
        _, line = _where(_dotted(location[:-1]), document, origins) if location[:-1] else ("", None)
        example = {
            "name": "name: my-model",
            "model": "model: {source: ORG/NAME}",
            "model.source": "source: ORG/NAME or a local folder",
        }
        return Problem(
            path, f"{path} is missing", line, f"add `{example.get(path, f'{location[-1]}: ...')}`, or `--model SOURCE`"
        )
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return Problem(
            path, f"{label}: {value!r} is not one of {', '.join(allowed)}", line, did_you_mean(str(value), allowed)
        )
    if kind == "string_pattern_mismatch":
        what = (
            "must be lower-case letters, digits, '-' and '.'"
            if path == "name"
            else "has characters that are not allowed there"
        )
        hint = f"try {slug(str(value))!r}" if path == "name" else None
        return Problem(path, f"{label}: {value!r} {what}", line, hint)
    if kind == "model_type":
        return Problem(
            path,
            f"{label}: expected `key: value` lines, got {value!r}",
            line,
            f"known in {path}: {', '.join(_section_fields(location))}",
        )
    message = error["msg"].replace("Input should be", "must be")
    return Problem(path, f"{label}: {message}, got {value!r}", line, None)


def _without_union_noise(problems: list[Problem]) -> list[Problem]:
    seen: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        seen.setdefault((problem.path, problem.message), problem)
    return list(seen.values())


def _unknown_names(
    data: dict[str, Any], document: Document | None, origins: Mapping[str, str], vocabulary: Mapping[str, Sequence[str]]
) -> list[Problem]:
    """Names that the catalog does not have, wherever it has a say."""
    problems = []
    for path, names in vocabulary.items():
        value = _get(data, path)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(item, str) or item in names or item.endswith((".yaml", ".yml")):
                continue
            label, line = _where(
                f"{path}.{index}" if isinstance(value, list) and path not in origins else path, document, origins
            )
            if document and isinstance(value, list) and line is not None:
                line = document.line((*path.split("."), index)) or line
            problems.append(
                Problem(
                    path,
                    f"{label}: there is no {item!r}",
                    line,
                    did_you_mean(item, names) or f"known: {', '.join(names)}",
                )
            )
    return problems
