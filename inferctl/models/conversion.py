"""The process that converts a model: `python -m inferctl.models.conversion SOURCE NEW_FOLDER PARENT_PID [ADAPTER]`.

With an adapter (LoRA), it converts nothing, but writes the model with the adapter in its weights.
Never runs code of the folder: pickles are read by torch's own unpickler, which only makes tensors (`weights_only`), and
transformers gets no remote code. If it fails, stdout is the error as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.core.errors import InferctlError, NotReadyError, UsageError, install_hint, shown
from inferctl.core.sizes import size
from inferctl.models import untrusted
from inferctl.models.adapter import WEIGHTS, Adapter, read
from inferctl.models.model import ROUTER_FILE, ModelFolder, weight_map

if TYPE_CHECKING:
    import torch

# Address space for torch and tokenizers, besides their code and twice the largest file with weights.
_EXTRA_BYTES = 4 * 2**30
# The structure of the largest published models has 2 MB.
_MAX_STRUCTURE_BYTES = 64 * 2**20
# Tensors that share memory are written once for each name. Without a limit, a small file could fill the disk.
_MAX_GROWTH = 4
_SMALL_BYTES = 64 * 2**20
_SET_SIGNAL_OF_DEAD_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# Weights in other formats are quantized: their sum with others needs new scales.
_SUMMED = ("F32", "F16", "BF16")
# Keys of a tokenizer's configuration that make transformers read other files.
_FILE_KEYS = re.compile(r"_file$|^name_or_path$|^auto_map$")


def convert(source: Path, target: Path) -> None:
    """Write the converted model of `source` into the empty folder `target`; config.json last.

    Raises `UsageError` for a model that cannot be converted.
    """
    folder = ModelFolder(source)
    untrusted.check(source, [*folder.files(), *folder.head_pickles])
    if (router := folder.router) is not None:
        _convert_router(source, target, router)
        return
    if folder.static is not None:
        raise UsageError(f"{source} has static embeddings as a pickle, which is not converted", "use safetensors")
    pickles = folder.pickled
    indexes: dict[Path, dict[str, str]] = {}
    for file in pickles:
        name = file.relative_to(source)
        place = target / name.with_name(_new_name(name.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(file)
        index = indexes.setdefault(place.parent, {})
        if repeated := sorted(index.keys() & tensors.keys()):
            raise UsageError(f"{source} has {repeated[0]} in two files with weights", "download the model again")
        index |= dict.fromkeys(tensors, place.name)
        _save(tensors, place)
        del tensors
    for file in folder.head_pickles:
        tensors = _tensors(file)
        place = target / file.stem / "model.safetensors"
        place.parent.mkdir()
        _save({f"linear.{name}": tensor for name, tensor in tensors.items()}, place)
    for parent, index in indexes.items():
        _write_index(source / parent.relative_to(target), parent, index)
    converted = {file.parent for file in pickles}
    config = source / "config.json"
    for file in folder.files():
        stale = file.parent in converted and file.name == "model.safetensors.index.json"  # its weights are not there
        if not stale and file != config and file.suffix != ".gguf" and file.name != "pytorch_model.bin.index.json":
            _copy(file, target / file.relative_to(source))
    if not (target / "tokenizer.json").is_file():
        _make_tokenizer(source, target)
    _copy(config, target / "config.json")  # without it, a folder is no model


def merge(base: ModelFolder, adapter: Adapter, target: Path) -> None:
    """Write `base` into `target` with W + scale * B A for its weights W: computed in fp32, one file in memory at a time.

    Files and number formats are those of the base. Raises `UsageError` for quantized weights.
    """
    from safetensors import safe_open

    changes, formats = matrices(adapter), base.number_formats
    for name in changes:
        if (found := formats[f"{name}.weight"]) not in _SUMMED:
            hint = "merge with the original weights, then quantize; or serve the adapter on this base"
            raise UsageError(f"the base has {name} in {found}, which is quantized", hint)
    for file in base.weight_files:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no dict
        for name, weight in tensors.items():
            if change := changes.get(name.removesuffix(".weight")):
                tensors[name] = (weight.float() + change[1] @ change[0]).to(weight.dtype)
        _save(tensors, target / file.name)
    for file in base.files():
        if not (target / file.relative_to(base.path)).exists() and file.suffix not in (".safetensors", ".gguf"):
            _copy(file, target / file.relative_to(base.path))


def matrices(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and scale * B of each layer in fp32, by its name in the base."""
    from safetensors.torch import load_file

    stored = {
        name.removeprefix("base_model.model."): tensor.float()
        for name, tensor in load_file(adapter.path / WEIGHTS).items()
    }
    return {
        layer: (stored[f"{layer}.lora_A.weight"], stored[f"{layer}.lora_B.weight"] * scale)
        for layer, (_, scale) in adapter.layers.items()
    }


def _convert_router(source: Path, target: Path, router: dict[str, str]) -> None:
    """Write the model of documents into the folder itself, next to the weights of queries.

    Raises `UsageError` for modules that the server does not compute, and for two tokenizers.
    """
    settings = untrusted.read_json(source / ROUTER_FILE)
    types, routes = settings.get("types"), settings["structure"]
    if not isinstance(types, dict):
        raise UsageError(f"`types` of {source / ROUTER_FILE} is {shown(types)}", "download the model again")
    classes = {role: [str(types.get(name, "")).rpartition(".")[2] for name in names] for role, names in routes.items()}
    query, document = source / router["query"], source / router["document"]
    first, *others = classes["document"]
    if classes["query"] != ["SparseStaticEmbedding"] or first not in ("Transformer", "MLMTransformer"):
        listed = {role: ", ".join(names) for role, names in classes.items()}
        raise UsageError(
            f"{source} has {listed['query']} for queries and {listed['document']} for documents",
            "use a model with weights of tokens for queries, and a transformer for documents",
        )
    for file in (query / "model.safetensors", query / "tokenizer.json", document / "tokenizer.json"):
        if not file.is_file():
            raise UsageError(f"{file} is missing", "save the model with a current sentence-transformers")
    if (query / "tokenizer.json").read_bytes() != (document / "tokenizer.json").read_bytes():
        raise UsageError(f"{source} has two tokenizers, which is not supported", "use another model")
    names = [(first, ""), *zip(others, routes["document"][1:], strict=True)]
    listing = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(names)
    ]
    for file in ModelFolder(source).files():
        inner = file.relative_to(source)
        if inner.parts[0] == router["document"]:
            inner = inner.relative_to(router["document"])
        if inner.as_posix() not in ("config.json", "modules.json"):
            _copy(file, target / inner)
    (target / "modules.json").write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
    _copy(document / "config.json", target / "config.json")  # without it, a folder is no model


def _copy(file: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if untrusted.is_blob(file):  # which nobody changes
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(os.path.realpath(file), copy)
            return
    shutil.copyfile(file, copy)


def import_libraries(source: Path) -> None:
    """Import what the conversion needs, before the memory is limited. Raises `NotReadyError`."""
    try:
        for name in ("torch", "safetensors.torch"):
            importlib.import_module(name)
        if not (source / "tokenizer.json").is_file():
            importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise NotReadyError(
            f"`inferctl convert` requires the package {error.name}, not installed", install_hint("serve")
        ) from None


def bound_memory(largest: int) -> None:
    """Limit the address space of this process to what it has, twice the bytes of the largest file, and 4 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * largest + _EXTRA_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _new_name(name: str) -> str:
    """Return the name of the safetensors file: `model-00001-of-00002.safetensors` of the shard 1 of 2."""
    return f"{name.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle to write by name. One that shares its memory with another one gets its own."""
    tensors = _load(file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > _MAX_GROWTH * file.stat().st_size + _SMALL_BYTES:
        raise UsageError(
            f"{file} has {size(file.stat().st_size)}, but its tensors would have {size(total)}",
            "do not use this file: weights that were trained do not repeat",
        )
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for name, tensor in tensors.items():
        own = tensor.clone() if uses[tensor.untyped_storage().data_ptr()] > 1 else tensor
        tensors[name] = own.contiguous()
    return tensors


def _load(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle by name. Raises `UsageError` if it has anything else."""
    import torch

    with file.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    if zipped:
        _check_archive(file)
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|function) ([\w.]+)", str(error))
        raise UsageError(
            f"{file} is not only weights" + (f": it calls {named[1]}" if named else ""),
            "do not load this file: it can run code. Use a model with *.safetensors",
        ) from None
    except (RuntimeError, ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError, MemoryError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{file} cannot be read: {why}", "download the model again") from None
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{file} is not a table of tensors, but a {type(found).__name__}", "export its weights again")
    for name, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.is_quantized or tensor.is_complex():
            raise UsageError(
                f"{file} has {shown(name)}, which is not a plain tensor", "export the weights with `save_pretrained`"
            )
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_archive(file: Path) -> None:
    """Raise `UsageError` for an archive that torch did not write: compressed, or with sizes that do not add up."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{file} is not a complete archive: {error}", "download the model again") from None
    structure = max((entry.file_size for entry in entries if entry.filename.endswith("data.pkl")), default=0)
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > file.stat().st_size
        or structure > _MAX_STRUCTURE_BYTES
    ):
        raise UsageError(
            f"{file} is not an archive of torch: its parts are compressed, or larger than the file",
            "do not use this file: it was made to fill memory",
        )


def _save(tensors: dict[str, torch.Tensor], place: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, place, metadata={"format": "pt"})
        os.umask(mask := os.umask(0))
        place.chmod(0o666 & ~mask)  # the library gives it to its owner alone, but a container has another user
    except (SafetensorError, KeyError, ValueError) as error:
        if number := re.search(r"os error (\d+)", str(error)):  # of the disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from None
        raise UsageError(f"{place.name} cannot be written: {error}", "export the weights again") from None


def _write_index(source: Path, target: Path, index: dict[str, str]) -> None:
    """Write the index of shards, if there are any. Raises `UsageError` if a tensor of the source's index is absent."""
    if set(index.values()) == {"model.safetensors"}:
        return
    listed = weight_map(source / "pytorch_model.bin.index.json")
    if missing := sorted(listed.keys() - index.keys()):
        raise UsageError(f"{source} is incomplete: no shard has {missing[0]}", "download the model again")
    document = {"metadata": {}, "weight_map": dict(sorted(index.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _make_tokenizer(source: Path, target: Path) -> None:
    """Write `tokenizer.json` from the vocabulary of the model. Raises `UsageError`, `NotReadyError`."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target) as place:
        staged = Path(place)
        for file in ModelFolder(source).files():
            if file.parent == source and file.suffix in (".json", ".txt", ".model"):
                shutil.copyfile(file, staged / file.name)
        for name in ("tokenizer_config.json", "config.json"):
            if (staged / name).is_file() and isinstance(found := untrusted.read_json(staged / name), dict):
                kept = {key: value for key, value in found.items() if not _FILE_KEYS.search(key)}
                (staged / name).write_text(json.dumps(kept), encoding="utf-8")
        hint = "save it with `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`, or use another model"
        try:
            tokenizer = AutoTokenizer.from_pretrained(staged, trust_remote_code=False, local_files_only=True)
            tokenizer.save_pretrained(staged / "new")
        except ImportError as error:
            package = re.search(r"sentencepiece|tiktoken|protobuf", str(error), re.IGNORECASE)
            name = package[0].lower() if package else str(error.name)
            raise NotReadyError(
                f"the tokenizer of {source} requires the package {name}, not installed", f"run `pip install {name}`"
            ) from None
        except Exception as error:  # transformers and tokenizers raise errors of many classes
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0].replace(place, str(source))
            raise UsageError(f"no tokenizer.json can be made for {source}: {why}", hint) from None
        made = staged / "new" / "tokenizer.json"
        if not made.is_file():
            raise UsageError(f"no tokenizer.json can be made for {source}: {type(tokenizer).__name__} has none", hint)
        made.rename(target / "tokenizer.json")


def main() -> int:
    """Convert, write an error to stdout, and return the exit code."""
    channel = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not appear next to the error
    ctypes.CDLL(None).prctl(_SET_SIGNAL_OF_DEAD_PARENT, signal.SIGKILL)
    source, target = map(Path, sys.argv[1:3])
    if os.getppid() != int(sys.argv[3]):  # it died before it could be noticed
        return 1
    try:
        import_libraries(source)
        folder, merged = ModelFolder(source), sys.argv[4:]
        bound_memory(
            max((each.stat().st_size for each in (folder.weight_files if merged else folder.pickled)), default=0)
        )
        if merged:
            merge(folder, read("adapter", Path(merged[0]), folder), target)
        else:
            convert(source, target)
        return 0
    except InferctlError as error:
        found = error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else (error.strerror or str(error)).lower()
        hint = "free disk space, or name a folder on another disk" if full else "name a folder that is writable"
        found = NotReadyError(f"the converted model cannot be written: {what}", hint)
    except MemoryError:
        found = UsageError("the model needs more memory than its files explain", "do not use these files")
    message = {"message": found.message, "hint": found.hint, "exit_code": found.exit_code}
    os.write(channel, json.dumps(message).encode())
    return 1


if __name__ == "__main__":
    sys.exit(main())
