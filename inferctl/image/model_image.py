"""Describes models in images of their own: what their labels say, and which file is in which layer.

Such an image has no base. Each weight file is a layer, and all other files are one. Times, owners and modes are fixed,
so equal files make equal layers: a fine-tune that changes one shard uploads one layer. The labels say what the model is
and which files it has, so that `inspect` needs no weights and a pull accepts nothing else.
`model_transfer.py` pushes and pulls the images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inferctl.core.errors import NotReadyError, UsageError
from inferctl.image import registry
from inferctl.image.image_name import split
from inferctl.models import image_source
from inferctl.models.adapter import AdapterFolder
from inferctl.models.hub import HubModel
from inferctl.models.model import ModelFolder, resolve_task

# The files are the same for every platform. Nodes of other platforms mount the image too, because it has no index.
# With two platforms and a context that is streamed, BuildKit of Engine 26.1 ends with `concurrent map writes`.
PLATFORM = "linux/amd64"
LABEL = "io.inferctl.model."
# What the label `task` says of an adapter.
ADAPTER = "adapter"
_WEIGHTS = (".safetensors", ".gguf")
# An image with the server has up to eight further layers, and overlay file systems mount at most 128.
_MAX_WEIGHT_LAYERS = 100
# A line of a Dockerfile has at most 65,535 bytes.
_MAX_LABEL_BYTES = 60_000
# Labels that lie could have numbers too large for a float.
_MAX_NUMBER = 10**18
NO_MODEL = "pass the name of an image that `inferctl model push` pushed"


@dataclass(frozen=True)
class ModelImage:
    """A model in a registry. `reference` is `name@digest`, `files` maps the files of the model to their bytes.

    `sha256` is that of `ModelFolder.digest`. `layers` are digests and bytes as the registry stores them. `config` is
    the content of config.json, None if it is too large for a label. `space`: as of `space_names`.
    """

    reference: str
    sha256: str
    architecture: str
    task: str
    number_formats: str
    parameters: int
    files: Mapping[str, int]
    layers: tuple[tuple[str, int], ...]
    config: Mapping[str, Any] | None = None
    library_type: str | None = None
    quantization: str | None = None
    source: str | None = None
    revision: str | None = None
    license: str | None = None
    space: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(self.files.values())

    @property
    def digest(self) -> str:
        """Digest of the image in its registry."""
        return self.reference.partition("@")[2]

    def document(self) -> dict[str, Any]:
        """Return the model as JSON data, for `--json`."""
        found = {name: value for name, value in asdict(self).items() if name not in ("config", "library_type")}
        found["layers"] = [{"digest": digest, "bytes": bytes_} for digest, bytes_ in self.layers]
        return {**found, "source_name": f"oci://{self.reference}", "bytes": self.bytes}


def groups(files: Mapping[str, int]) -> list[list[str]]:
    """Return the files of each layer: first all that are no weights, then each weight file, sorted.

    A model with more than 100 weight files has several of them in a layer.
    """
    weights = sorted(name for name in files if name.endswith(_WEIGHTS))
    each = math.ceil(len(weights) / _MAX_WEIGHT_LAYERS) or 1
    layers = [weights[start : start + each] for start in range(0, len(weights), each)]
    return [sorted(files.keys() - set(weights)), *layers]


def labels_of(
    folder: ModelFolder, files: Mapping[str, int], source: str | None, revision: str | None, license_id: str | None
) -> dict[str, str]:
    """Return the labels of the image of `folder`. They do not depend on the machine, the time or the folder's name.

    Raises `UsageError` for a model that no task computes, and for values that are too long for a label.
    """
    listed = _compact(dict(sorted(files.items())))
    if len(quoted(listed)) > _MAX_LABEL_BYTES:  # before the hash, which reads all files
        raise UsageError(
            f"{folder.path} has {len(files):,} files. Their names and sizes have {len(quoted(listed)):,} bytes, and a "
            f"label has at most {_MAX_LABEL_BYTES:,}",
            "merge the shards of the weights into fewer files, or shorten the names",
        )
    parameters, formats = folder.parameters, sorted(set(folder.number_formats.values()))
    quantization = folder.config.get("quantization_config")
    own = {
        "sha256": folder.digest,
        "architecture": folder.architecture,
        "task": ADAPTER
        if isinstance(folder, AdapterFolder)
        else resolve_task("auto", folder, source or str(folder.path)),
        "number_formats": ",".join(formats),
        "parameters": str(parameters),
        "files": listed,
        "library_type": folder.library_type,
        "quantization": str(quantization.get("quant_method")) if isinstance(quantization, Mapping) else None,
        "config": _compact(folder.config),
        "space": space_names(folder),
    }
    found = {f"{LABEL}{name}": value for name, value in own.items() if value}
    found |= {
        f"org.opencontainers.image.{name}": value
        for name, value in {"source": source, "revision": revision, "licenses": license_id}.items()
        if value
    }
    if len(quoted(found[f"{LABEL}config"])) > _MAX_LABEL_BYTES:  # labels of a classifier
        del found[f"{LABEL}config"]
    too_long = [name for name, value in found.items() if len(quoted(value)) > _MAX_LABEL_BYTES]
    if too_long:
        raise UsageError(
            f"{too_long[0]} of {folder.path} is longer than the {_MAX_LABEL_BYTES:,} bytes of a label", "shorten it"
        )
    return found


def space_names(folder: ModelFolder, max_input_tokens: int | None = None) -> str:
    """Return the names of the spaces of an embedding model, comma separated. Others have none."""
    if isinstance(folder, AdapterFolder) or resolve_task("auto", folder, str(folder.path)) != "embed":
        return ""
    from inferctl.reading import embedding_config, space  # they need numpy, which other commands do not

    try:
        found = space.read(folder.path, embedding_config.read(folder.path, max_input_tokens))
    except UsageError:  # no server computes it, but an image can have it
        return ""
    return ",".join(each.name for each in found.values())


def inspect(source: str) -> ModelImage:
    """Return what the registry has as `source`, an image with or without `oci://`, from its labels.

    Raises `UsageError` if there is no such image or it is no model, `NotReadyError` if the registry does not respond.
    """
    reference = image_source.reference(source)
    name = split(reference)[0]
    digest = image_source.digest(reference) or registry.digest(reference)
    found = registry.remote_image(f"{name}@{digest}", PLATFORM)
    return read(f"{name}@{digest}", found.labels, found.layers)


def read(reference: str, labels: Mapping[str, str], layers: Sequence[tuple[str, int]]) -> ModelImage:
    """Return the model that `labels` describe. Others wrote them. Raises `UsageError` if they describe none."""

    def label(name: str) -> str:
        return str(labels.get(f"{LABEL}{name}") or "")

    try:
        files = json.loads(label("files"))
        if not files or not all(type(bytes_) is int and 0 <= bytes_ <= _MAX_NUMBER for bytes_ in files.values()):
            raise ValueError
        config = json.loads(label("config") or "null")
        if not isinstance(config, dict | None) or not re.fullmatch(r"[0-9a-f]{64}", label("sha256")):
            raise ValueError
        if not 0 <= (parameters := int(label("parameters"))) <= _MAX_NUMBER:
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{reference} is not a model image: it has no valid labels {LABEL}*", NO_MODEL) from None
    image_source.check_names(files, reference)
    return ModelImage(
        reference=reference,
        sha256=label("sha256"),
        space=label("space"),
        architecture=label("architecture"),
        task=label("task"),
        number_formats=label("number_formats"),
        parameters=parameters,
        files=files,
        layers=tuple(layers),
        config=config,
        library_type=label("library_type") or None,
        quantization=label("quantization") or None,
        source=labels.get("org.opencontainers.image.source"),
        revision=labels.get("org.opencontainers.image.revision"),
        license=labels.get("org.opencontainers.image.licenses"),
    )


def facts(source: str) -> HubModel:
    """Return the facts about a model image from its registry, without its weights. Raises the errors of `inspect`."""
    found = inspect(source)
    if found.task == ADAPTER:
        raise UsageError(f"{source} is an adapter, not a model", "name it in `model.adapters`")
    if found.config is None:
        raise NotReadyError(f"the labels of {source} lack config.json", f"run `inferctl model pull {source}`")
    return HubModel(found.digest, found.config, found.parameters, found.files, found.library_type)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def quoted(value: str) -> str:
    """Return a label's value as a Dockerfile accepts it."""
    return '"' + re.sub(r'([\\"$])', r"\\\1", " ".join(value.splitlines())) + '"'
