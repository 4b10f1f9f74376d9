"""Renders the Dockerfile, ignore file, locks and labels of an image from a spec and the catalog.

Equal inputs give equal bytes. The only files that are read are the templates and the server's own files; the model
source is checked for being a local folder.

The layers of the image, each a separate `COPY --link`, with large and stable ones first:

    base | python | torch closure | vLLM | server dependencies | int8 | embed | weights | server | config

Each model and each adapter is a layer of weights. An image that downloads some has an empty folder for them (`cache`).
A change in one part changes only its own layer, so a new config or a new adapter pushes one layer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from inferctl.config.spec import DEFAULT_PORT, Spec
from inferctl.core import assets
from inferctl.core.errors import UsageError
from inferctl.facts.catalog import BaseImage, Stack
from inferctl.image.locks import Locks
from inferctl.image.model_image import PLATFORM, ModelImage, groups, quoted
from inferctl.models.adapter import CONFIG, WEIGHTS
from inferctl.models.image_source import is_image
from inferctl.models.model import SUFFIXES, is_hub_id, longest_start_s
from inferctl.models.weights_folders import WeightsFolder, downloads, weights_folders

# 1980-01-01, the oldest time that a zip file can store: the modification time of each file in a layer.
EPOCH = 315532800
# Where an image expects the folder of its key file. A mounted file alone would not change when it is replaced.
KEYS_PATH = "/keys"
# Where an image stores the weights that it downloads. templates/Dockerfile.j2 has it too.
CACHE_PATH = "/model-cache"
# Where an image has its spec. templates/Dockerfile.j2 has it too.
CONFIG_PATH = "/etc/inferctl/inferctl.yaml"
# The label with the models and adapters of an image that has several.
NAMES_LABEL = "io.inferctl.names"
_LISTED = ("name", "base", "weights", "path", "revision", "task", "sha256", "space")
# Overlay file systems mount at most 128 layers.
_MAX_WEIGHT_LAYERS = 115
# HEALTHCHECK does not count failures before the server can be ready. Embeddings: imports and the comparison with fp32.
_START_PERIOD_S = 180
# The files of the server in the package. The relay and the ledger need packages that images do not have.
_SERVER_FILES = (
    "__init__.py",
    *(f"{room}/*.py" for room in ("batching", "config", "core", "facts", "models", "reading")),
    "serve/**/*.py",
    "tenancy/__init__.py",
    "tenancy/access/*.py",
    *(f"tenancy/metering/{name}.py" for name in ("__init__", "usage_event", "outbox", "prices", "recorder")),
)


@dataclass(frozen=True)
class Provenance:
    """The source of the spec: URL and commit of its repository, time of the commit (RFC 3339), version of inferctl.

    `epoch`: creation time of the image, in seconds since 1970.
    """

    source: str | None = None
    revision: str | None = None
    created: str | None = None
    version: str = ""
    epoch: int = EPOCH


@dataclass(frozen=True)
class Rendered:
    """The inputs of `docker buildx build`, without the server's own files (`server_files`).

    `files`: build-context path -> content. `contexts`: name of a build context -> folder. `secrets`: ids that the
    Dockerfile accepts, all optional. `build_args`: SOURCE_DATE_EPOCH, so that every builder records the same creation
    time. `tag`: from the spec, or by default from the image content. `folders`: of the weights.
    """

    dockerfile: str
    dockerignore: str
    files: dict[str, bytes]
    contexts: dict[str, str]
    secrets: tuple[str, ...]
    labels: dict[str, str]
    build_args: dict[str, str]
    tag: str = ""
    folders: tuple[WeightsFolder, ...] = ()


def render(
    spec: Spec,
    base: BaseImage,
    stack: Stack,
    locks: Locks,
    provenance: Provenance,
    folders: Sequence[WeightsFolder] = (),
    images: Mapping[str, ModelImage] = {},
) -> Rendered:
    """Render the image of `spec` on `base` with `stack`. Raises `UsageError` if a value is not allowed in a Dockerfile.

    `folders`: with what is known about the weights. `images`: the model images to bake, by name.
    """
    folders = folders or weights_folders(spec)
    baked = [each for each in folders if each.weights == "bake"]
    base_image = spec.image.base_image or (f"{base.reference}@{base.digest}" if base.digest else base.reference)
    port = spec.serve.port or DEFAULT_PORT
    extras = [name for name in ("int8", "embed") if getattr(locks, name)]
    optional = {"vllm": locks.vllm, "torch": locks.torch}
    closures = ["server", "dependencies", *extras, *(name for name, lock in optional.items() if lock)]
    # Ubuntu and Debian package pip separately. A base with its own Python also has pip.
    apt_build = ["python3-pip"] if base.python.packages else []
    values: dict[str, Any] = {
        "apt_build": apt_build,
        "apt_runtime": [*base.python.packages, *base.packages],
        "base_image": base_image,
        "base_key": base.key,
        "baked": [_stage(each, images.get(each.name)) for each in baked],
        "compiles": stack.vllm is not None and stack.cuda is not None,
        "downloads": downloads(spec),
        "epoch": EPOCH,
        "extras": extras,
        "gpu": stack.cuda is not None,
        "has_torch_lock": locks.torch is not None,
        "has_vllm_lock": locks.vllm is not None,
        "labels": {},
        "model_platform": PLATFORM,
        "packages": list(base.packages),
        "port": port,
        "python": base.python.executable,
        "pythonpath": ":".join(f"/opt/inferctl/{folder}" for folder in closures),
        "stack_key": stack.key,
        "start_period": _START_PERIOD_S,
        "title": spec.name,
        "torch_index": stack.index,
        "version": provenance.version,
        "several": bool(spec.models),
        "weights": " and ".join(dict.fromkeys(each.weights for each in folders)),
        "wheels": spec.image.wheels is not None,
    }
    if sum(len(each["layers"]) or 1 for each in values["baked"]) > _MAX_WEIGHT_LAYERS:
        raise UsageError(
            f"the image would have more than {_MAX_WEIGHT_LAYERS} layers with weights, which file systems do not mount",
            "set `weights: mount`, or bake fewer adapters",
        )
    contexts = {each.stage: each.source for each in baked if not is_hub_id(each.source) and not is_image(each.source)}
    unknown = [each for each in baked if each.stage in contexts and each.sha256 is None]
    if spec.image.wheels is not None:
        contexts["wheels"] = spec.image.wheels
    files = {f"layers/config{CONFIG_PATH}": _container_config(spec, folders, port), **locks.files()}
    content = None
    if not unknown:
        weights = "\n".join(each.sha256 or "" for each in baked)
        content = _content(_fill("Dockerfile.j2", values), files, weights, spec.image.embed)
    tag = spec.image.tag or f"{spec.serve.precision}-{content[:12] if content else 'unknown'}"
    labels = _labels(spec, base_image, stack, provenance, tag, content, folders[0].space)
    names = _names(folders) if spec.models or len(folders) > 1 else None
    values |= {"labels": labels, "start_period": _start_period(stack, [each.bytes or math.inf for each in folders])}
    return Rendered(
        dockerfile=_fill("Dockerfile.j2", values, names=quoted(names) if names else ""),
        dockerignore=_fill("dockerignore.j2", {}),
        files=files,
        contexts=contexts,
        secrets=("pip_conf", "ca", "hf_token"),
        labels=labels | ({NAMES_LABEL: names} if names else {}),
        build_args={"SOURCE_DATE_EPOCH": str(provenance.epoch)},
        tag=tag,
        folders=tuple(folders),
    )


def _stage(folder: WeightsFolder, image: ModelImage | None) -> dict[str, Any]:
    """Return what the template needs to copy the weights of `folder` into the image."""
    files = [CONFIG, WEIGHTS] if folder.base else [f"*{suffix}" for suffix in sorted(SUFFIXES)]
    return {
        **{name: getattr(folder, name) for name in ("stage", "path", "base", "revision")},
        "weights_stage": folder.stage.replace("model", "weights"),
        "files": files,
        "hub_model": folder.source if is_hub_id(folder.source) else None,
        "image": image.reference if image else None,
        "layers": [layer for layer in groups(image.files) if layer] if image else [],
    }


def _start_period(stack: Stack, weights_bytes: list[float]) -> int:
    """Return the start period of HEALTHCHECK in seconds, in whole minutes."""
    if not stack.vllm:  # engines of several models start one after the other
        return _START_PERIOD_S * len(weights_bytes)
    total = sum(weights_bytes)
    return math.ceil(longest_start_s(int(total) if math.isfinite(total) else None) / 60) * 60


def _content(dockerfile: str, files: Mapping[str, bytes], weights: str, embed: bool) -> str:
    """Return the sha256 (hex) over all inputs that determine the files and the settings of an image.

    `dockerfile` is rendered without labels and with a fixed start period, so that the commit of the spec does not
    count, nor whether the weights are on this machine. Comments do not count.
    """
    steps = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    parts = {"Dockerfile": steps.encode(), **files, "weights": weights.encode()}
    parts |= {name: file.read_bytes() for name, file in server_files(embed).items()}
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def server_files(embed: bool = False) -> dict[str, Path]:
    """Return the server's own files: path in the build context (`layers/server/opt/inferctl/...`) -> local file.

    `embed`: with the command line, which is the whole package.
    """
    package = assets.package()
    target = "layers/server/opt/inferctl/server/inferctl"
    files = (file for pattern in (["**/*.py"] if embed else _SERVER_FILES) for file in package.glob(pattern))
    found = {f"{target}/{file.relative_to(package).as_posix()}": file for file in files}
    # The server reads the hardware facts to report the name of its GPU.
    for file in (assets.root() / "benchmarks" / "hardware").glob("*.yaml"):
        found[f"{target}/_assets/benchmarks/hardware/{file.name}"] = file
    return dict(sorted(found.items()))


def _container_config(spec: Spec, folders: Sequence[WeightsFolder], port: int) -> bytes:
    """Return the spec for the container, without paths of the build machine and without build settings."""
    exclude = {"image", "deploy", "hardware", "metering"}
    data = spec.model_dump(mode="json", exclude=exclude, exclude_none=True)
    # The addresses may have passwords, and only the relay needs them, which runs outside of the container.
    metering = spec.metering.model_dump(mode="json", include={"mode", "data", "outbox_size"}, exclude_defaults=True)
    if spec.metering.prices:
        metering["prices"] = f"{KEYS_PATH}/{Path(spec.metering.prices).name}"
    if metering:
        data["metering"] = metering
    data["serve"] |= {"port": port, "host": "0.0.0.0"}
    paths = {each.name: each.path for each in folders if each.weights != "download"}
    for name, model in [(one["name"], one["model"]) for one in data["models"]] or [(spec.name, data["model"])]:
        model["source"] = paths.get(name, model["source"])
        for adapter in model["adapters"]:
            adapter["source"] = paths.get(adapter["name"], adapter["source"])
    if spec.access.keys:
        data["access"]["keys"] = (
            f"{KEYS_PATH}/{'keys.json' if spec.access.key_store else Path(str(spec.access.keys)).name}"
        )
    del data["access"]["data"]  # of the build machine
    if spec.access.broker:  # only the relay, which runs outside of the container, connects to it
        data["access"]["broker"] = "nats://relay"
    return yaml.safe_dump(data, sort_keys=True).encode()


def _labels(
    spec: Spec,
    base_image: str,
    stack: Stack,
    provenance: Provenance,
    tag: str,
    content: str | None,
    space: str | None,
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
    }
    if not spec.models:  # `io.inferctl.names` has those of several
        source = spec.model.source
        labels |= {
            "io.inferctl.model.source": source if is_image(source) or is_hub_id(source) else Path(source).name,
            "io.inferctl.model.revision": spec.model.revision,
            "io.inferctl.model.weights": spec.model.weights,
            "io.inferctl.model.space": space,
        }
    return {key: value for key, value in labels.items() if value}


def _names(folders: Sequence[WeightsFolder]) -> str:
    """Return the label that lists the names of an image, as JSON."""
    listed = []
    for each in folders:
        found = {name: getattr(each, name) for name in _LISTED}
        found["source"] = each.source if is_image(each.source) or is_hub_id(each.source) else None
        listed.append({name: value for name, value in found.items() if value})
    return json.dumps(listed, separators=(",", ":"))


def _fill(template: str, values: Mapping[str, Any], *, names: str = "") -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets.root() / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # a Dockerfile is not HTML; _check_values rejects unsafe values
    )
    _check_values(values)
    return environment.get_template(template).render(values, names=names)


def _check_values(value: Any, name: str = "") -> None:
    """Raise `UsageError` for a value that could end its line or string, or start a variable or a command."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(key, name)
            _check_values(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, name)
    elif isinstance(value, str) and (found := re.search(r"""[\x00-\x1f\x7f"'`$\\;|&<>]""", value)):
        raise UsageError(
            f"{name}: {value!r} contains {found.group()!r}, which is not allowed in a Dockerfile",
            "use a name or path without special characters",
        )
