"""Spec + catalog -> Dockerfile, ignore file, locks and labels. Equal input gives equal bytes.

Nothing is read but the template, the server's own files, and whether the model's source is a folder here.

The image's layers, heavy and stable first, each a `COPY --link` of its own:

    base | python | torch closure | server dependencies | int8 | weights | server | config

A new config pushes the last one alone; new weights theirs alone; a new torch leaves the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from inferctl import assets
from inferctl.errors import UsageError
from inferctl.model import SUFFIXES, is_hub_id

if TYPE_CHECKING:
    from inferctl.catalog import BaseImage, Stack
    from inferctl.locks import Locks
    from inferctl.spec import Spec

# 1980-01-01, the oldest time a zip can carry: the modification time of every file in a layer, at every commit.
EPOCH = 315532800
DEFAULT_PORT = 8080
# What `inferctl/serve/` imports of the rest of the package.
_SERVER_MODULES = (
    "__init__",
    "assets",
    "catalog",
    "document",
    "drivers",
    "errors",
    "hub",
    "model",
    "outputs",
    "settings",
    "sizes",
    "spec",
)


@dataclass(frozen=True)
class Provenance:
    """Where the spec comes from: URL and commit of its repository, the commit's time (RFC 3339), inferctl's version.

    `epoch`: the time that the image says it was created at, seconds since 1970.
    """

    source: str | None = None
    revision: str | None = None
    created: str | None = None
    version: str = ""
    epoch: int = EPOCH


@dataclass(frozen=True)
class Rendered:
    """Everything `docker buildx build` needs besides the server's own files (`server_files`).

    `files`: build-context path -> content. `contexts`: named build contexts -> folder. `secrets`: ids that the Dockerfile accepts, all optional.
    `build_args`: SOURCE_DATE_EPOCH, so that the image's own record of its making is the same on any builder too.
    `tag`: of the spec, else from what is in the image.
    """

    dockerfile: str
    dockerignore: str
    files: dict[str, bytes]
    contexts: dict[str, str]
    secrets: tuple[str, ...]
    labels: dict[str, str]
    build_args: dict[str, str]
    tag: str = ""


def render(
    spec: Spec,
    base: BaseImage,
    stack: Stack,
    locks: Locks,
    provenance: Provenance,
    weights: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Rendered:
    """The image of `spec` on `base` with `stack`. Raises `UsageError` when a value cannot stand in a Dockerfile.

    `weights`: digest of the local model folder that is baked, None if it is not known. `labels`: more labels.
    """
    base_image = spec.image.base_image or (f"{base.reference}@{base.digest}" if base.digest else base.reference)
    hub_model = spec.model.source if spec.model.weights != "mount" and is_hub_id(spec.model.source) else None
    port = spec.serve.port or DEFAULT_PORT
    folders = ["server", "dependencies", *(["int8"] if locks.int8 else []), *(["torch"] if locks.torch else [])]
    # Ubuntu and Debian ship pip apart from the interpreter; a base that brings its own Python brings pip too.
    apt_build = ["python3-pip"] if base.python.packages else []
    values: dict[str, Any] = {
        "apt_build": apt_build,
        "apt_runtime": list(base.python.packages),
        "base_image": base_image,
        "base_key": base.key,
        "epoch": EPOCH,
        "frontend": spec.image.frontend,
        "gpu": stack.cuda is not None,
        "has_int8_lock": locks.int8 is not None,
        "has_torch_lock": locks.torch is not None,
        "hub_model": hub_model if spec.model.weights == "bake" else None,
        "hub_revision": spec.model.revision,
        "labels": {},
        "model_files": [f"*{suffix}" for suffix in sorted(SUFFIXES)],
        "port": port,
        "python": base.python.executable,
        "pythonpath": ":".join(f"/opt/inferctl/{folder}" for folder in folders),
        "stack_key": stack.key,
        "title": spec.name,
        "torch_index": stack.index,
        "version": provenance.version,
        "weights": spec.model.weights,
        "wheels": spec.image.wheels is not None,
    }
    contexts = {}
    if spec.model.weights == "bake" and hub_model is None:
        contexts["model"] = spec.model.source
    if spec.image.wheels is not None:
        contexts["wheels"] = spec.image.wheels
    files = {"layers/config/etc/inferctl/inferctl.yaml": _container_config(spec, port), **locks.files()}
    content = None
    if "model" not in contexts or weights is not None:
        content = _content(_fill("Dockerfile.j2", values), files, weights if "model" in contexts else None)
    tag = spec.image.tag or f"{spec.serve.precision}-{content[:12] if content else 'unknown'}"
    every_label = {**_labels(spec, base_image, stack, provenance, tag, content), **(labels or {})}
    return Rendered(
        dockerfile=_fill("Dockerfile.j2", {**values, "labels": every_label}),
        dockerignore=_fill("dockerignore.j2", {}),
        files=files,
        contexts=contexts,
        secrets=("pip_conf", "ca", "hf_token"),
        labels=every_label,
        build_args={"SOURCE_DATE_EPOCH": str(provenance.epoch)},
        tag=tag,
    )


def _content(dockerfile: str, files: Mapping[str, bytes], weights: str | None) -> str:
    """sha256 (hex) over what decides the files and the settings of an image.

    `dockerfile` is one without labels. Its comments do not count, and neither does a revision of the spec's repository.
    """
    steps = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    parts = {"Dockerfile": steps.encode(), **files, "weights": (weights or "").encode()}
    parts |= {name: file.read_bytes() for name, file in server_files().items()}
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def server_files() -> dict[str, Path]:
    """The server's own files: name in the build context (`layers/server/opt/inferctl/...`) -> file on this disk, sorted."""
    package = assets.package()
    place = "layers/server/opt/inferctl/server/inferctl"
    files = [package / f"{module}.py" for module in _SERVER_MODULES]
    files += (package / "serve").rglob("*.py")
    found = {f"{place}/{file.relative_to(package).as_posix()}": file for file in files}
    # Of the shipped facts, the server reads those of hardware: it names the GPU that it runs on.
    for file in (assets.root() / "benchmarks" / "hardware").glob("*.yaml"):
        found[f"{place}/_assets/benchmarks/hardware/{file.name}"] = file
    return dict(sorted(found.items()))


def _container_config(spec: Spec, port: int) -> bytes:
    """The spec as the container reads it: no path of the building machine, and nothing about the build."""
    data = spec.model_dump(mode="json", exclude={"image", "deploy", "bench", "hardware"}, exclude_none=True)
    data["serve"] |= {"port": port, "host": "0.0.0.0"}
    if spec.model.weights != "download":
        data["model"]["source"] = "/model"
    return yaml.safe_dump(data, sort_keys=True).encode()


def _labels(
    spec: Spec, base_image: str, stack: Stack, provenance: Provenance, tag: str, content: str | None
) -> dict[str, str]:
    name, _, digest = base_image.partition("@")
    labels = {
        "org.opencontainers.image.title": spec.name,
        "org.opencontainers.image.version": tag,
        "org.opencontainers.image.source": provenance.source,
        "org.opencontainers.image.revision": provenance.revision,
        "org.opencontainers.image.created": provenance.created,
        "org.opencontainers.image.base.name": name,
        "org.opencontainers.image.base.digest": digest,
        "io.inferctl.version": provenance.version,
        "io.inferctl.content.sha256": content,
        "io.inferctl.precision": spec.serve.precision,
        "io.inferctl.stack": stack.key,
        "io.inferctl.model.source": spec.model.source if is_hub_id(spec.model.source) else Path(spec.model.source).name,
        "io.inferctl.model.revision": spec.model.revision,
        "io.inferctl.model.weights": spec.model.weights,
    }
    return {key: value for key, value in labels.items() if value}


def _fill(template: str, values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets.root() / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # a Dockerfile is not HTML; _refuse is its guard
    )
    _refuse(values)
    return environment.get_template(template).render(values)


def _refuse(value: Any, name: str = "") -> None:
    """Refuse values that could end their line, their string, or start a variable or another command in the Dockerfile."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse(key, name)
            _refuse(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _refuse(inner, name)
    elif isinstance(value, str) and (found := re.search(r"""[\x00-\x1f\x7f"'`$\\;|&<>]""", value)):
        raise UsageError(
            f"{name}: {value!r} contains {found.group()!r}, which cannot stand in a Dockerfile",
            "choose a plain name or path",
        )
