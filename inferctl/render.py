"""Spec + catalog -> Dockerfile, ignore file, locks and labels. Equal input gives equal bytes.

Nothing is read but the template, and whether the model's source is a folder here.

The image's layers, heavy and stable first, each a `COPY --link` of its own:

    base | python | torch closure | server dependencies | int8 | weights | server | config

A new config pushes the last one alone; new weights theirs alone; a new torch leaves the rest.
"""

from __future__ import annotations

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

# 1980-01-01, the oldest time a zip can carry: the modification time of everything that is installed.
EPOCH = 315532800
DEFAULT_PORT = 8080
# What `inferctl/serve/` imports of the rest of the package.
_SERVER_MODULES = (
    "__init__",
    "assets",
    "catalog",
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
    """Where the spec comes from: URL and commit of its repository, the commit's time (RFC 3339), and inferctl's version."""

    source: str | None = None
    revision: str | None = None
    created: str | None = None
    version: str = ""


@dataclass(frozen=True)
class Rendered:
    """Everything `docker buildx build` needs besides the server's own files (`server_files`).

    `files`: build-context path -> content. `contexts`: named build contexts -> folder. `secrets`: ids that the Dockerfile accepts, all optional.
    `build_args`: SOURCE_DATE_EPOCH, so that the image's own record of its making is the same on any builder too.
    """

    dockerfile: str
    dockerignore: str
    files: dict[str, bytes]
    contexts: dict[str, str]
    secrets: tuple[str, ...]
    labels: dict[str, str]
    build_args: dict[str, str]


def render(spec: Spec, base: BaseImage, stack: Stack, locks: Locks, provenance: Provenance) -> Rendered:
    """The image of `spec` on `base` with `stack`. Raises `UsageError` when a value cannot stand in a Dockerfile."""
    base_image = spec.image.base_image or (f"{base.reference}@{base.digest}" if base.digest else base.reference)
    hub_model = spec.model.source if spec.model.weights != "mount" and is_hub_id(spec.model.source) else None
    port = spec.serve.port or DEFAULT_PORT
    folders = ["server", "dependencies", *(["int8"] if locks.int8 else []), *(["torch"] if locks.torch else [])]
    labels = _labels(spec, base_image, stack, provenance)
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
        "labels": labels,
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
    return Rendered(
        dockerfile=_fill("Dockerfile.j2", values),
        dockerignore=_fill("dockerignore.j2", {}),
        files={"layers/config/etc/inferctl/inferctl.yaml": _container_config(spec, port), **locks.files()},
        contexts=contexts,
        secrets=("pip_conf", "ca", "hf_token"),
        labels=labels,
        build_args={"SOURCE_DATE_EPOCH": str(EPOCH)},
    )


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
    data = spec.model_dump(mode="json", exclude={"image", "deploy", "bench"}, exclude_none=True)
    data["serve"] |= {"port": port, "host": "0.0.0.0"}
    if spec.model.weights != "download":
        data["model"]["source"] = "/model"
    return yaml.safe_dump(data, sort_keys=True).encode()


def _labels(spec: Spec, base_image: str, stack: Stack, provenance: Provenance) -> dict[str, str]:
    name, _, digest = base_image.partition("@")
    labels = {
        "org.opencontainers.image.title": spec.name,
        "org.opencontainers.image.version": spec.image_reference().rpartition(":")[2],
        "org.opencontainers.image.source": provenance.source,
        "org.opencontainers.image.revision": provenance.revision,
        "org.opencontainers.image.created": provenance.created,
        "org.opencontainers.image.base.name": name,
        "org.opencontainers.image.base.digest": digest,
        "io.inferctl.version": provenance.version,
        "io.inferctl.spec.sha256": spec.digest(),
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
