"""Reads a model folder in Hugging Face layout without torch: architecture, size and digest."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol

from inferctl.config.spec import HUB_ID, Task, TaskSetting
from inferctl.core.errors import UsageError, shown
from inferctl.models import image_source, untrusted

_READ_BYTES_PER_S = 100_000_000  # weights on a slow network disk
# How long a start of vLLM may take, without reading the weights. The slowest took 423 s, on two cores with other load.
_START_S = 900
_UNKNOWN_WEIGHTS_BYTES = 150_000_000_000
# Weights, tokenizer and configuration. Other files, such as a README, do not change what the model computes.
SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".gguf", ".jinja", ".metadata"})
# Folder next to `snapshots` in the hub's cache, with converted snapshots by commit.
CONVERTED = "converted"
# Where an image has its weights, or expects them to be mounted.
IMAGE_FOLDER = "/model"
# Where sentence-transformers writes the kind of a model, its prompts and its similarity.
LIBRARY_FILE = "config_sentence_transformers.json"
# Where it writes which modules are for queries, and which for documents.
ROUTER_FILE = "router_config.json"
# The class of modules.json that looks up the vector of each token, without a transformer.
STATIC = "StaticEmbedding"
# Ends of the class names of generative models.
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What sentence-transformers, PyLate and Stanford call models without a dense vector.
OTHER_OUTPUTS = frozenset({"SparseEncoder", "MultiVectorEncoder", "ColBERT", "HF_ColBERT"})
# Folders with the layers of BGE-M3 for the weights and the vectors of tokens. Its repository has them as pickles.
BGE_M3 = ("sparse_linear", "colbert_linear")
# Of a classifier. The largest published ones have some thousands.
_MAX_LABELS = 1_000_000
_MADE_FOR: dict[TaskSetting, str] = {
    "embed": "an embedding model",
    "rerank": "a reranker",
    "classify": "a classifier",
    "generate": "a generative model",
}


class UnconvertedError(UsageError):
    """The model in `folder` is complete, but `inferctl convert` has to write it in another form."""

    def __init__(self, folder: Path, source: str, found: str) -> None:
        super().__init__(
            f"{folder} {found}",
            f"convert it without running its code, and use the new folder: `inferctl convert {source} NEW_FOLDER`",
        )
        self.folder = folder


class PickledWeightsError(UnconvertedError):
    """The model has weights only as pickles, which are never loaded by a server."""

    def __init__(self, folder: Path, source: str, found: str) -> None:
        without = "has no *.safetensors weights, only"
        super().__init__(folder, source, f"{without} {found}: a pickle, which can run code when it is loaded")


@dataclass(frozen=True)
class ModelFolder:
    """A local model: a folder with `*.safetensors` and `config.json`, which static embeddings can lack."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`; for static embeddings without one, their class."""
        file = self.path / (self.router or {}).get("document", "") / "config.json"
        return {"architectures": [STATIC]} if not file.is_file() and self.static is not None else _json(file)

    @property
    def router(self) -> dict[str, str] | None:
        """The folders of what queries and documents begin with, in a folder of sentence-transformers without a model.

        None for other folders. Raises `UsageError` if there are others than both.
        """
        file = self.path / ROUTER_FILE
        if (self.path / "config.json").is_file() or not file.is_file():
            return None
        routes = _json(file).get("structure")
        if not isinstance(routes, dict) or routes.keys() != {"query", "document"}:
            raise UsageError(
                f"{file} has other routes than query and document, which is not supported", "use another model"
            )
        found = {role: str(names[0]) if isinstance(names, list) and names else "" for role, names in routes.items()}
        for name in found.values():
            untrusted.inside(self.path, name)
        return found

    @property
    def head_pickles(self) -> list[Path]:
        """The pickles of BGE-M3's layers for tokens that were not converted."""
        files = [self.path / f"{name}.pt" for name in BGE_M3]
        return files if all(file.is_file() and not file.with_suffix("").is_dir() for file in files) else []

    @property
    def static(self) -> str | None:
        """The folder, relative to the model folder, of static embeddings; None for a transformer."""
        for module in self.modules[:1]:
            if str(module.get("type", "")).endswith(f".{STATIC}"):
                return str(module.get("path", ""))
        return None

    @property
    def architecture(self) -> str:
        """Class name of the model, such as `BertModel`."""
        return architecture(self.config)

    @property
    def has_modules(self) -> bool:
        """Whether the folder has the `modules.json` of sentence-transformers, so it is an embedding model."""
        return (self.path / "modules.json").is_file()

    @property
    def library_type(self) -> str | None:
        """What sentence-transformers says of a model that it saved, such as `CrossEncoder`; None if it says nothing."""
        file = self.path / LIBRARY_FILE
        return str(_json(file).get("model_type", "")) or None if file.is_file() else None

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files at the top of the folder: those of the index of a sharded model, else all.

        Those of static embeddings are in the folder of their module.
        Mistral's folders have the weights a second time, in `consolidated.safetensors`.
        """
        top = self.path / (self.static or "")
        shards = self.shards  # reads the index, which can have megabytes
        return sorted(file for file in top.glob("*.safetensors") if not shards or file.name in shards)

    @property
    def shards(self) -> set[str]:
        """Names of the weight files in the index of a sharded model; empty without an index."""
        return set(weight_map(self.path / "model.safetensors.index.json").values())

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, from the headers of the safetensors files."""
        return sum(math.prod(tensor["shape"]) for file in self.weight_files for _, tensor in tensors(file))

    @property
    def weights_bytes(self) -> int:
        """Size in bytes of the safetensors files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def number_formats(self) -> dict[str, str]:
        """Number formats of all tensors by name, as the headers of safetensors have them: `F32`, `F8_E4M3`."""
        return {name: str(tensor["dtype"]) for file in self.weight_files for name, tensor in tensors(file)}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the names and contents of `files`."""
        total = hashlib.sha256()
        for file in self.files():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.relative_to(self.path).as_posix()}\0{content}\n".encode())
        return total.hexdigest()

    @property
    def bytes(self) -> int:
        """Total size of `files` in bytes."""
        return sum(file.stat().st_size for file in self.files())

    @property
    def converted(self) -> bool:
        """Whether it was made of a hub model that cannot be served as it is on the hub."""
        return self.path.parent.name == CONVERTED and self.path.parent.parent.name.startswith("models--")

    @property
    def modules(self) -> list[dict[str, Any]]:
        """The entries of `modules.json`; empty without one. Raises `UsageError` if a path leads out of the folder."""
        file = self.path / "modules.json"
        found = untrusted.read_json(file) if file.is_file() else []
        if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
            raise UsageError(f"{file} is not a list of modules", "download the model again")
        for module in found:
            path = untrusted.inside(self.path, module.get("path", "")).relative_to(self.path)
            if not is_loaded(path):  # `digest` and images leave it out
                raise UsageError(
                    f"{file} names {path}, and dotted folders, `onnx` and `openvino` are not part of a model",
                    "rename the folder, also in modules.json",
                )
        return found

    @property
    def pickled(self) -> list[Path]:
        """The pickles with weights (`pytorch_model.bin` or its shards) in folders that have no safetensors.

        These are the folder itself, and those of its modules. Raises `UsageError` if a shard is missing.
        """
        folders = dict.fromkeys([self.path, *(self.path / str(module.get("path", "")) for module in self.modules)])
        return [file for folder in folders if not any(folder.glob("*.safetensors")) for file in _pickles(folder)]

    def files(self) -> list[Path]:
        """Return the files that determine what the model computes, sorted.

        Files in dotted, `onnx/` and `openvino/` folders are not part of the model.
        """
        found = (p for p in self.path.rglob("*") if p.suffix in SUFFIXES and p.exists() and not p.is_dir())
        return sorted(p for p in found if is_loaded(p.relative_to(self.path)))


def find(source: str, revision: str | None = None, environment: Mapping[str, str] = os.environ) -> ModelFolder:
    """Return the local folder of `source`: the folder itself, or a hub model or a model image in the local cache.

    Downloads nothing. Raises `UsageError` if there is no folder or it does not contain a complete model.
    """
    path = local_folder(source, revision, environment)
    folder = ModelFolder(path)
    if not (path / "config.json").is_file() and folder.static is None:
        if folder.router is not None:
            raise UnconvertedError(
                path, source, "is a Router of sentence-transformers, with its model in a folder below"
            )
        below = str(next(iter(folder.modules), {}).get("path", ""))
        if below and (path / below / "config.json").is_file():
            raise transformer_below(path, below)
        hint = "pass a folder in Hugging Face layout: config.json, tokenizer.json, *.safetensors"
        if (path / image_source.FOLDER / "config.json").is_file():  # the root of a model image
            hint = f"pass {path / image_source.FOLDER}, or for a pod name the model image in model.source"
        raise UsageError(f"{path} is not a model folder: config.json not found", hint)
    untrusted.check(path, folder.files())
    _ = folder.config
    if pickled := folder.pickled:
        raise PickledWeightsError(path, source, pickled[0].relative_to(path).as_posix())
    if not folder.weight_files:
        raise UsageError(
            f"{path} has no *.safetensors weights",
            "save the model with `model.save_pretrained(folder)`, or download a revision with safetensors",
        )
    for file in folder.weight_files:
        list(tensors(file))
    if missing := sorted(folder.shards - {file.name for file in folder.weight_files}):
        raise UsageError(
            f"{path} is incomplete: {missing[0]} not found ({len(missing)} of {len(folder.shards)} weight files)",
            "download the model again",
        )
    return folder


def local_folder(source: str, revision: str | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder with the files of `source`: the folder itself, or one in the cache of hub or model images.

    Raises `UsageError` if there is none.
    """
    path = Path(source).expanduser()
    if image_source.is_image(source):
        pulled = image_source.cached(source, environment)
        if pulled is None:
            raise UsageError(
                f"the model of {source} is not in the cache of this machine", f"run `inferctl model pull {source}`"
            )
        return pulled
    if is_folder(path):
        return path
    if (found := snapshot(source, revision, environment)) is not None:
        return found
    if os.path.isfile(path):  # noqa: PTH113  # unlike `Path.is_file`, it accepts names that are too long
        raise UsageError(f"{source} is a file, not a model folder", "pass the folder that has config.json")
    looks_local = re.fullmatch(HUB_ID, source) is None
    raise UsageError(
        f"model folder {source} not found"
        if looks_local
        else f"model {source} not found: it is neither a folder nor in the local hub cache",
        "mount the weights with `docker run -v DIR:/model:ro`"
        if source == IMAGE_FOLDER
        else "check the path, or pass a hub id such as sentence-transformers/all-MiniLM-L6-v2"
        if looks_local
        else f"download it with `hf download {source}`, pass a local folder, or set HF_HOME to your cache",
    )


def transformer_below(folder: Path, path: str) -> UsageError:
    """Return the error for a folder of sentence-transformers whose transformer is in the folder `path` of it."""
    return UsageError(
        f"the Transformer module of {folder} is in {path}",
        f"move the files of {path} into the model folder, and set its path in modules.json to an empty text",
    )


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class name of a model from its `config.json`, else its model type."""
    names = config.get("architectures")
    return str(names[0] if isinstance(names, list) and names else config.get("model_type", "unknown"))


def labels(config: Mapping[str, Any]) -> list[str]:
    """Return the labels of a classifier in the order of its outputs, from its `config.json` as transformers reads it.

    Raises `UsageError` if the keys of `id2label` are not 0, 1, 2 and so on.
    """
    names = config.get("id2label")
    count = config.get("num_labels", len(names) if isinstance(names, Mapping) and names else 2)
    if not isinstance(names, Mapping) or len(names) != count:  # the number counts, if they disagree
        if type(count) is not int or not 0 < count <= _MAX_LABELS:
            raise UsageError(f"`num_labels` of config.json is {shown(count)}", "correct the file")
        return [f"LABEL_{number}" for number in range(count)]
    by_number = {str(key): str(name) for key, name in names.items()}
    if missing := [str(number) for number in range(len(names)) if str(number) not in by_number]:
        raise UsageError(
            f"`id2label` of config.json has {len(names)} labels, but none with the key {shown(missing[0])}",
            "correct the file: the keys are 0, 1, 2 and so on",
        )
    return [by_number[str(number)] for number in range(len(names))]


def weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor from an index of shards; empty without the index.

    Raises `UsageError` if a name is not that of a file in the same folder.
    """
    names = _json(index).get("weight_map") if index.is_file() else None
    found = {name: file for name, file in names.items() if isinstance(file, str)} if isinstance(names, dict) else {}
    for file in set(found.values()):
        if "/" in file:
            raise UsageError(f"{index} names {shown(file)}, which is not a file next to it", "download the model again")
    return found


class TaskFacts(Protocol):
    """What decides the task of a model, in its folder or on a hub. The properties are those of `ModelFolder`."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def has_modules(self) -> bool: ...

    @property
    def library_type(self) -> str | None: ...


def resolve_task(requested: TaskSetting, model: TaskFacts, source: str) -> Task:
    """Return the task of the model `source`: `requested`, or for `auto` the one that its files imply.

    sentence-transformers decides, if it wrote the files. With modules, an embedding model can have the architecture of
    a generative one. A classifier with one label is a reranker, unless `classify` is requested. Raises
    `UsageError` if the model is made for another task.
    """
    config = model.config
    name = architecture(config)
    generative = name.endswith(GENERATIVE)
    classifier = name.endswith("ForSequenceClassification")
    task: Task = "embed"
    if classifier:
        task = "rerank" if len(labels(config)) == 1 else "classify"
    elif model.library_type == "CrossEncoder":
        task = "rerank"
    elif generative and not model.has_modules:
        task = "generate"
    if requested in ("auto", task):
        return task
    if classifier and requested == "classify":
        return "classify"
    if generative and task != "rerank" and requested in ("embed", "generate"):
        return "embed" if requested == "embed" else "generate"
    if generative and requested == "rerank" and task == "generate":
        raise UsageError(
            f"{source} is a generative model ({name}): no file says how it scores a query and a document",
            "if it is a reranker, use a revision with `modules.json`, or write the files as docs/serve.md shows",
        )
    requires, made_for = _MADE_FOR[requested], _MADE_FOR[task]
    if task == "classify":
        made_for += f" with {len(labels(config))} labels"
    raise UsageError(
        f"model.task: {requested} requires {requires}, but {source} is {made_for} ({name})",
        f"set `model.task: auto`, or choose {requires}",
    )


def shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor in a safetensors file. Raises `UsageError` if it is incomplete."""
    yield from ((name, tuple(tensor["shape"])) for name, tensor in tensors(file))


def longest_start_s(weights_bytes: int | None) -> float:
    """Return the seconds after which a start of vLLM has failed. Unknown weights (None) count as 150 GB.

    `inferctl serve` then ends it and reports why. Health checks and probes from outside wait as long, because they know
    no reason.
    """
    return _START_S + (_UNKNOWN_WEIGHTS_BYTES if weights_bytes is None else weights_bytes) / _READ_BYTES_PER_S


def is_loaded(file: PurePath) -> bool:
    """Return whether a file (relative to its model folder) is part of the model: not dotted and not an export."""
    return not any(part.startswith(".") or part in ("onnx", "openvino") for part in file.parts)


def is_hub_id(source: str) -> bool:
    """Return whether `source` is a hub id (`org/name`) and not an existing folder."""
    return re.fullmatch(HUB_ID, source) is not None and not Path(source).is_dir()


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder. A name that is too long for the file system is none."""
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def snapshot(source: str, revision: str | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of a hub model, or of its conversion, in the hub's cache; None if it is not there."""
    # The same variables as in huggingface_hub, which is slow to import.
    caches = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = environment.get("HF_HOME", f"{caches}/huggingface")
    hub = environment.get("HF_HUB_CACHE", environment.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    cache = Path(hub).expanduser() / f"models--{source.replace('/', '--')}"
    if not is_folder(cache):
        return None
    ref = cache / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if not commit or "/" in commit:
        return None
    # What `hub.fetch` made of a snapshot without safetensors comes first.
    places = (cache / CONVERTED / commit, cache / "snapshots" / commit)
    return next((place for place in places if place.is_dir()), None)


def _json(path: Path) -> dict[str, Any]:
    data = untrusted.read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a JSON object", "the download may be incomplete: download the model again")
    return data


def _pickles(folder: Path) -> list[Path]:
    """Return the file `pytorch_model.bin` of a folder, or the shards of its index."""
    whole, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    found = [whole] if whole.is_file() else [folder / name for name in sorted(set(weight_map(index).values()))]
    for file in found:
        if not file.is_file():
            raise UsageError(f"{folder} is incomplete: {file.name} not found", "download the model again")
    untrusted.check(folder, found)
    return found


def tensors(file: Path, most: int = 100_000_000) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tensors in the header of a safetensors file (an 8-byte little-endian length, then JSON) by name.

    `most`: bytes of the header. Raises `UsageError` if the file cannot be read, or if its header or its size is wrong,
    as in an incomplete download or a Git LFS pointer.
    """
    problem = UsageError(
        f"{file} is not a complete safetensors file",
        "the file may be an incomplete download or a Git LFS pointer: download the model again",
    )
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > most:
                raise problem
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if file.stat().st_size != 8 + length + end or not all(_is_tensor(**each) for each in tensors.values()):
            raise problem
        yield from tensors.items()
    except PermissionError:
        hint = f"make it readable for the user of the server: `chmod -R a+rX {file.parent}`"
        raise UsageError(f"{file} cannot be read: permission denied", hint) from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, struct.error):
        raise problem from None


def _is_tensor(dtype: Any, shape: Any, data_offsets: Any) -> bool:
    """Return whether an entry of a header can be a tensor. The smallest numbers have 4 bits."""
    start, end = data_offsets
    sized = all(isinstance(length, int) and length >= 0 for length in shape)
    return isinstance(dtype, str) and sized and math.prod(shape) <= 2 * (end - start)
