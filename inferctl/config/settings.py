"""Merges `inferctl.yaml`, environment variables and flags into the effective settings and records their origins.

The order of precedence is: command-line flag, `INFERCTL_*` environment variable, spec file, default. `resolve` is a
pure function and reports all errors at once, each with its line.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from inferctl.config.spec import DEFAULT_FILE, DEFAULT_PORT, HUB_ID, IMAGE_SCHEME, Spec, slug
from inferctl.core import document as documents
from inferctl.core import validation
from inferctl.core.addresses import is_address
from inferctl.core.document import Document, dotted
from inferctl.core.errors import Problem, SpecError, UsageError, did_you_mean, shown

ENVIRONMENT_PREFIX = "INFERCTL_"
# Variables that the command line or the tests read. They are not settings of the spec.
RESERVED_VARIABLES = frozenset({"INFERCTL_SPEC", "INFERCTL_REQUIRE"})
# Settings of a spec file that `null` in a variable removes. Other texts stay texts.
_REMOVABLE = ("access.keys", "access.broker", "access.budgets", "cache.size", "slo.p99_ms")
# The environment of a server that only its parent process uses: it asks for no keys and computes every input, whatever
# the spec says.
OPEN_ACCESS = {
    "INFERCTL_ACCESS_KEYS": "null",
    "INFERCTL_ACCESS_BROKER": "null",
    "INFERCTL_ACCESS_BUDGETS": "null",
    "INFERCTL_ACCESS_TRUSTED_PROXIES": "",
    "INFERCTL_CACHE_SIZE": "null",
}
# The environment of a server whose capacity is measured: it accepts every request.
WITHOUT_ADMISSION = {
    "INFERCTL_SLO_P99_MS": "null",
    "INFERCTL_SERVE_MAX_WAIT_SECONDS": "86400",
    "INFERCTL_SERVE_MAX_QUEUE_TOKENS": "1000000000",
}
_EXAMPLE = "write a commented example into another folder with `inferctl init DIR`"


@dataclass(frozen=True)
class Resolved:
    """The effective settings.

    `origins` maps a dotted path to `flag --model`, `env INFERCTL_X`, `file.yaml:12` or `default`.
    """

    spec: Spec
    file: str | None
    origins: dict[str, str]
    warnings: list[str]


def read(path: Path) -> Document:
    """Read a spec file. Raises `UsageError` if it does not exist, `SpecError` if it is not a YAML mapping."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a spec file", f"did you mean {path / DEFAULT_FILE}?")
    if not path.exists():
        instead = "pass `--spec FILE`" if path == Path(DEFAULT_FILE) else "correct its path"
        raise UsageError(f"spec file {path} not found", f"write one with `inferctl init`, or {instead}")
    return documents.read(path, _EXAMPLE)


def parse(text: str, file: str = DEFAULT_FILE) -> Document:
    """Parse the text of a spec file. Raises `SpecError`."""
    return documents.parse(text, file, _EXAMPLE)


def resolve(
    document: Document | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> Resolved:
    """Merge flags, environment, file and defaults, in this order of precedence, and validate the result.

    A path in the file is relative to the file. A path in a flag or a variable is relative to the working directory.

    `flags` maps dotted paths to values; None means that the flag is not given. `vocabulary` maps dotted paths to the
    names that the catalog has for them. Raises `SpecError` with all errors.
    """
    known = paths()
    written: dict[str, str] = {}
    data: dict[str, Any] = json.loads(json.dumps(document.data, default=str)) if document else {}
    file = document.file if document else None
    origins = dict.fromkeys(known, "default")
    for path in known:
        if document and _get(data, path) is not _ABSENT:
            origins[path] = f"{file}:{document.line(path.split('.'))}"
    if document:
        written = _make_relative(document, data)
    variables = {f"{ENVIRONMENT_PREFIX}{path.upper().replace('.', '_')}": path for path in known}
    warnings: list[str] = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        if is_service_link(variable, text):
            continue
        if variable not in variables:
            close = difflib.get_close_matches(variable, variables, 1)
            hint = f"did you mean {close[0]}?" if close else None
            if variable.startswith(f"{ENVIRONMENT_PREFIX}ACCESS_"):  # without it, the server would be open to everyone
                raise UsageError(f"{variable} is not a setting", hint or f"unset {variable}")
            warnings.append(f"{variable} is not a setting" + (f"; {hint}" if hint else ""))
            continue
        path = variables[variable]
        default = field(path).get_default(call_default_factory=True)
        _put(data, path, default if path in _REMOVABLE and text == "null" else _from_text(text, known[path]))
        origins[path] = f"env {variable}"
    for path, value in flags.items():
        if value is not None:
            _put(data, path, _from_text(value, known[path]) if path == "serve.aliases" else value)
            origins[path] = f"flag {flag(path)}"
    for path in (*_PATHS, *_listed_sources(data)):
        if isinstance(value := _get(data, path), str) and value.startswith("~"):
            _put(data, path, str(Path(value).expanduser()))
    if "name" not in data and isinstance(source := _get(data, "model.source"), str):
        data["name"] = slug(source)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        where = functools.partial(_where, document=document, origins=origins)
        keys_at = functools.partial(validation.section_keys, Spec)
        problems = validation.problems(error, document, keys_at, _hint_for, where)
        problems += _unknown_names(data, document, origins, vocabulary or {})
        raise SpecError(file, sorted(problems, key=lambda problem: problem.line or 0)) from None
    if problems := _unknown_names(data, document, origins, vocabulary or {}):
        raise SpecError(file, problems)
    written = {
        path: value for path, value in written.items() if not origins.get(path, "").startswith(("flag ", "env "))
    }
    return Resolved(spec.written_as(written), file, origins, warnings)


# Variables that Kubernetes sets in each pod for each Service of its namespace ("docker links compatible").
_LINK_NAMES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def is_service_link(variable: str, value: str) -> bool:
    """Return whether Kubernetes set `variable` for a Service, as in INFERCTL_SERVE_PORT=tcp://10.0.0.1:80."""
    return bool(_LINK_NAMES.search(variable) or (variable.endswith("_PORT") and _LINK_VALUE.fullmatch(value)))


def listening_port(environment: Mapping[str, str]) -> int:
    """Return the port of the server, from the environment of its image. Raises `UsageError`."""
    variable = f"{ENVIRONMENT_PREFIX}SERVE_PORT"
    text = environment.get(variable, "")
    if not text or is_service_link(variable, text):
        return DEFAULT_PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UsageError(
            f"{variable}: {shown(text)} is not a port", "build the image with a `serve.port` from 1 to 65535"
        )
    return int(text)


def _make_relative(document: Document, data: dict[str, Any]) -> dict[str, str]:
    """Make the paths in `data` relative to the working directory, unless that contains the file.

    Returns the values in the file (JSON) of the changed paths, by dotted path.
    """
    folder = Path(document.file).parent
    if folder.resolve() == Path.cwd():
        return {}
    written = {}
    for path in (*_PATHS, *_NAMES_OR_FILES, *_listed_sources(data)):
        value = _get(data, path)
        items = value if isinstance(value, list) else [value]
        found = [_relative_to(folder, path, item) if isinstance(item, str) else item for item in items]
        if found != items:
            _put(data, path, found if isinstance(value, list) else found[0])
            written[path] = json.dumps(value)
    return written


def _listed_sources(data: dict[str, Any]) -> Iterator[str]:
    """Yield the paths of the sources in lists: of `models`, and of adapters."""
    models = data.get("models")
    found = [f"models.{index}.model" for index in range(len(models))] if isinstance(models, list) else []
    for model in ["model", *found]:
        if model != "model":
            yield f"{model}.source"
        adapters = _get(data, f"{model}.adapters")
        if isinstance(adapters, list):
            yield from (f"{model}.adapters.{index}.source" for index in range(len(adapters)))


def _relative_to(folder: Path, path: str, value: str) -> str:
    if value.startswith(("/", "~")) or (path == "access.keys" and is_address(value)):
        return value
    if path.endswith(".source"):
        local = not (re.fullmatch(HUB_ID, value) or value.startswith(IMAGE_SCHEME)) or (folder / value).is_dir()
    elif path in _NAMES_OR_FILES:
        local = value.endswith((".yaml", ".yml"))
    else:
        local = True
    if not local:
        return value
    found = str(folder / value)
    # Without the dot, `folder/name` would be a valid hub id.
    return found if found.startswith(("/", "..")) else f"./{found}"


def paths() -> dict[str, Any]:
    """Return the type annotation of each setting by dotted path."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, info in section.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from walk(annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", annotation

    return dict(walk(Spec, ""))


_ABSENT = object()
# Settings that can be a local file or folder; `~` is expanded.
_PATHS = (
    *("model.source", "image.wheels", "image.locks", "serve.adapter_folders", "serve.batches.folder"),
    *("access.keys", "access.data", "metering.data", "metering.prices"),
)
# Settings that are a name in the catalog or a file.
_NAMES_OR_FILES = ("hardware", "image.base")
_HINTS = {
    "image.repository": "use lower case and no tag, as in registry.example.com/team/name",
    "image.base_image": "use registry.example.com/team/cuda:13.0 or registry.example.com/team/cuda@sha256:<64 digits>",
    "image.tag": "use at most 128 letters, digits, '_', '.' and '-'",
    "image.platform": "use a platform such as linux/amd64 or linux/arm/v7",
    "metering.outbox_size": "write a size such as 1GiB or 256MB",
    "serve.api_processes": "`auto` takes one per 4 cores, at most 4",
    "model.revision": "set a commit, a branch or a tag of the model",
    "model": "set model.source to a hub id, to a folder with `weights: mount` or `weights: bake`, or to an image "
    "without `revision`: oci://registry/team/model:tag",
}

_MISSING = {
    "name": "name: my-model",
    "model": "model: {source: ORG/NAME}",
    "model.source": "source: ORG/NAME or a local folder",
}


def field(path: str) -> FieldInfo:
    """Return the definition of a setting."""
    *sections, name = path.split(".")
    section: Any = Spec
    for each in sections:
        section = section.model_fields[each].annotation
    found: FieldInfo = section.model_fields[name]
    return found


def flag(path: str) -> str:
    """Return the name of the option that sets a setting."""
    return "--model" if path == "model.source" else f"--{path.rsplit('.', 1)[-1].replace('_', '-')}"


def _get(data: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        elif isinstance(data, dict) and key in data:
            data = data[key]
        else:
            return _ABSENT
    return data


def _put(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        inner: Any = data[int(key)] if isinstance(data, list) else data.get(key)
        if not isinstance(inner, dict) and not (isinstance(inner, list) and inner and path.startswith("model")):
            inner = data[key] = {}
        data = inner
    data[last] = value


def _from_text(text: str, annotation: Any) -> Any:
    """Convert an environment variable to the type of its setting. A tag of 20250101 stays text."""
    if typing.get_origin(annotation) is list:
        return [part.strip() for part in text.strip("[] ").split(",") if part.strip()]
    if typing.get_origin(annotation) is dict:
        with contextlib.suppress(ValueError):
            return json.loads(text)
    if not {int, float, bool} & {annotation, *typing.get_args(annotation)}:
        return text
    return documents.scalar(text)


def _where(
    location: Sequence[str | int], document: Document | None, origins: Mapping[str, str]
) -> tuple[str, int | None]:
    """Return the label of a setting in a message, with the flag or variable that sets it, and its line in the file."""
    path = dotted(location)
    parents = (dotted(location[:end]) for end in range(len(location), 0, -1))  # a list comes from one place
    origin = next((origins[each] for each in parents if each in origins), "")
    if not origin:  # of a section, that of what sets something in it
        within = (origins[name] for name in origins if name.startswith(f"{path}."))
        origin = next((each for each in within if each.startswith(("flag ", "env "))), "")
    if origin.startswith(("flag ", "env ")):
        return f"{path} (from {origin.split(' ', 1)[1]})", None
    return path, document.line(location) if document else None


def _hint_for(kind: str, path: str, value: object) -> str | None:
    if kind == "missing":
        example = _MISSING.get(path) or f"{path.rpartition('.')[2]}: ..."
        return f"add `{example}`, or pass `--model SOURCE`"
    if kind == "string_pattern_mismatch" and path == "name":
        return f"use lower case, digits, '-' and '.', as in {slug(str(value))}"
    if path.startswith("serve.aliases."):
        return "use one word of letters, digits and ._:/@+-, as in text-embedding-3-small"
    if path.startswith("access.budgets."):
        return 'write `"team:NAME": 50 EUR/month` or `"model:NAME": ...`; the period is day, week, month or total'
    if kind == "one_or_several":
        return "remove one of the two, or use `--model` in another folder"
    return _HINTS.get(path) if kind in ("string_pattern_mismatch", "value_error", "count_or_auto") else None


def _unknown_names(
    data: dict[str, Any], document: Document | None, origins: Mapping[str, str], vocabulary: Mapping[str, Sequence[str]]
) -> list[Problem]:
    """Return a problem for each value in `vocabulary` settings that is not in the catalog and not a file."""
    problems = []
    for path, names in vocabulary.items():
        value = _get(data, path)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(item, str) or item in names or item.endswith((".yaml", ".yml")):
                continue
            label, line = _where(path.split("."), document, origins)
            if document and isinstance(value, list) and line is not None:
                line = document.line((*path.split("."), index))
            hint = did_you_mean(item, names) or f"known: {', '.join(names)}"
            problems.append(Problem(path, f"{label}: {shown(item)} not found", line, hint))
    return problems
