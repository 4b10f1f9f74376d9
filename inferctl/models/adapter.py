"""Reads an adapter of PEFT (LoRA) without torch, and refuses what vLLM would refuse, ignore or apply in part.

vLLM compares only the last part of each tensor's name with the model, copies what fits of a tensor, and reads few
fields of the configuration. So an adapter for another model can load, be listed, and answer with the base's weights.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inferctl.core.errors import UsageError, needs_packages, shown
from inferctl.models import model as model_folder
from inferctl.models import untrusted
from inferctl.models.model import ModelFolder

T = TypeVar("T")
_Tensors = Mapping[str, Mapping[str, Any]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZER = "tokenizer.json"
# What vLLM accepts as `--max-lora-rank` (`config/lora.py`).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Adapters in one step of the engine, each of which takes memory of the device. Requests of more wait for a step.
MOST_AT_ONCE = 8
_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
_MAX_HEADER_BYTES = 32 * 2**20
# Layers of the encoder of a multimodal model, which vLLM gives no adapter unless it is told to.
_OF_ENCODER = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|multi_modal|mm_|speech)\w*\.")
# Fields that change nothing of a trained adapter.
_HARMLESS = (
    "auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size megatron_config megatron_core runtime_config"
)
# Number format -> bytes of a number, and the bits of its exponent: all are set in infinity and NaN.
_FORMATS = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
MERGE = "train it without, or merge it into a copy of the model with `merge_and_unload` of PEFT"
_SAVE = "save it with `save_pretrained` of PEFT, from the model that it was trained on"


_Rank = Annotated[int, Field(ge=1, le=RANKS[-1])]
_Scale = Annotated[float, Field(gt=0, lt=1e6)]
# Words, dots and alternatives: what PEFT writes. It and vLLM run patterns as regular expressions on each layer's name.
_Pattern = Annotated[str, Field(pattern=r"^\^?(?:[A-Za-z0-9_|.]|\\\.)+$", max_length=500)]


class _Config(BaseModel):
    """What of `adapter_config.json` changes what an adapter computes, as far as vLLM computes it too."""

    model_config = ConfigDict(strict=True, extra="allow")
    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: _Rank
    lora_alpha: _Scale
    target_modules: Annotated[list[str] | str, Field(min_length=1)]
    rank_pattern: Annotated[dict[_Pattern, _Rank], Field(max_length=4096)] | None = None
    alpha_pattern: Annotated[dict[_Pattern, _Scale], Field(max_length=4096)] | None = None
    use_rslora: bool = False
    # Those that change only where the training starts. Others change the weights of the base.
    init_lora_weights: Literal[None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"] = None


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its base. `layers`: name of a linear layer of the base -> rank and scale of its update."""

    name: str
    path: Path
    layers: Mapping[str, tuple[int, float]]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(rank for rank, _ in self.layers.values())

    @property
    def bytes(self) -> int:
        return (self.path / WEIGHTS).stat().st_size

    def document(self) -> dict[str, Any]:
        """Return what `GET /info` says about it."""
        return {"name": self.name, "sha256": self.digest, "rank": self.rank, "bytes": self.bytes}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over its configuration and weights."""
        return AdapterFolder(self.path).digest


class AdapterFolder(ModelFolder):
    """A folder with an adapter of PEFT. Folders of a training have more files, which no server reads."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `adapter_config.json`."""
        found = untrusted.read_json(self.path / CONFIG)
        return found if isinstance(found, dict) else _refuse(f"{CONFIG} is not a JSON object", _SAVE)

    @property
    def architecture(self) -> str:
        """Kind of the adapter, such as `LORA`."""
        return str(self.config.get("peft_type"))

    @cached_property
    def weight_files(self) -> list[Path]:
        """The file with the weights."""
        return [self.path / WEIGHTS]

    def files(self) -> list[Path]:
        """Return the files that determine what the adapter changes."""
        return [self.path / CONFIG, self.path / WEIGHTS]


@dataclass(frozen=True)
class Slots:
    """The memory for adapters that vLLM allocates at its start: `count` at a time, each with room for `rank`."""

    count: int
    rank: int

    @classmethod
    def of(cls, adapters: Sequence[Adapter], kind: str, spare: int = 0, spare_rank: int = 1) -> Slots:
        """Return those for `adapters`, and `spare` ones up to a rank, on a device of `kind`, cpu or cuda.

        On a CPU, vLLM adds the adapter in the last slot to requests for the base in the same step (vllm #48421). So
        there is a slot for each adapter, and a last one, which stays empty.
        """
        most = len(adapters) + spare
        count = most + 1 if kind == "cpu" else min(most, MOST_AT_ONCE)
        largest = max(*(adapter.rank for adapter in adapters), spare_rank if spare else 1, 1)
        return cls(count, next(rank for rank in RANKS if rank >= largest))

    def numbers(self, base: ModelFolder) -> int:
        """Return the numbers in all slots: matrices A and B for each layer of `base` and its table of tokens.

        A table that is also the output layer counts twice: vLLM wraps both.
        """
        sizes = _linear_layers(base)
        total = sum(map(sum, sizes.values()))
        tables = [shape for name, shape in sizes.items() if not _in_block(name)]
        return self.count * self.rank * (total + (sum(tables[0]) if len(tables) == 1 else 0))


def find(source: str, revision: str | None = None) -> Path:
    """Return the local folder of an adapter. Raises `UsageError` if there is none, or it has no adapter of PEFT."""
    path = model_folder.local_folder(source, revision)
    if not (path / CONFIG).is_file():
        raise UsageError(f"{source} is not an adapter of PEFT: {CONFIG} not found", _SAVE)
    return path


def read(name: str, folder: Path, base: ModelFolder) -> Adapter:
    """Return the adapter in `folder`. Raises `UsageError` if it does not fit `base`, or vLLM would not compute it."""
    try:
        return _read(name, folder, base)
    except UsageError as error:
        raise UsageError(f"adapter {name}: {error.message}", error.hint) from None


def _read(name: str, folder: Path, base: ModelFolder) -> Adapter:
    file = folder / WEIGHTS
    untrusted.check(folder, [each for each in (folder / CONFIG, file) if os.path.lexists(each)])
    config = _checked(untrusted.read_json(folder / CONFIG))
    if not file.is_file():
        _refuse(f"{folder} has no {WEIGHTS}, and a pickle can run code when it is loaded", _SAVE)
    tensors = dict(model_folder.tensors(file, _MAX_HEADER_BYTES))
    layers = _match(tensors, config, base)
    _check_numbers(file, tensors)
    _check_tokens(folder, base.path)
    return Adapter(name, folder, layers)


def _checked(found: Any) -> _Config:
    """Return a configuration. Raises `UsageError` for an adapter that vLLM does not compute, or a wrong field."""
    try:
        config = _Config.model_validate(found)
    except ValidationError as error:
        (first, *_) = error.errors()
        what = f"its {first['loc'][0]} is {shown(found.get(first['loc'][0]))}" if first["loc"] else CONFIG
        _refuse(f"{what}: {first['msg']}", MERGE)
    for key, value in (config.model_extra or {}).items():
        if value and value != "none" and key not in _HARMLESS.split():
            _refuse(f"its {CONFIG} sets {shown(key)}: {shown(value)}, which vLLM does not apply", MERGE)
    return config


def _match(tensors: _Tensors, config: _Config, base: ModelFolder) -> dict[str, tuple[int, float]]:
    """Return rank and scale by layer. Raises `UsageError` unless each tensor is one of two of a layer of the base."""
    linear, targets = _linear_layers(base), config.target_modules
    ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ""  # no pattern is run
    rank_of, alpha_of = _by_layer(config.rank_pattern, config.r), _by_layer(config.alpha_pattern, config.lora_alpha)
    if not any(map(_in_block, linear)):
        _refuse(
            "the shapes of the base's layers are not known: its weights are packed", "use the model in 16 or 8 bits"
        )
    found: dict[str, tuple[int, float]] = {}
    parts: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            _refuse(f"its tensor {shown(name)} is not {_PREFIX}LAYER.lora_A.weight or lora_B.weight", MERGE)
        layer, part = match[1], match[2]
        if layer not in linear:
            example = next((known for known in linear if known.endswith(layer.rpartition(".")[2])), "other names")
            _refuse(f"the base has no linear layer {shown(layer)}: it has {example}", "use it on its own base")
        if not _in_block(layer) or _OF_ENCODER.search(layer):
            _refuse(f"{layer} is no layer of the decoder's blocks, so vLLM may not apply it", MERGE)
        if not f".{layer}".endswith(ends):
            _refuse(f"its {CONFIG} leaves out {layer}, which has tensors: vLLM applies them, and PEFT does not", _SAVE)
        rank, (outputs, inputs) = rank_of(layer), linear[layer]
        wanted = [rank, inputs] if part == "A" else [outputs, rank]
        if tensor["shape"] != wanted:
            why = f"has the shape {shown(tensor['shape'])}, and rank {rank} on the base's {layer} requires {wanted}"
            _refuse(f"its tensor {shown(name)} {why}", "use it on its own base, with the configuration of its training")
        if tensor["dtype"] not in _FORMATS:
            _refuse(f"its numbers have the format {shown(tensor['dtype'])}", f"save it as one of {', '.join(_FORMATS)}")
        parts[layer] = parts.get(layer, "") + part
        found[layer] = rank, alpha_of(layer) / (math.sqrt(rank) if config.use_rslora else rank)
    if single := next((layer for layer, both in parts.items() if len(both) < 2), None):
        _refuse(f"it has lora_{parts[single]} without the other matrix for {single}", _SAVE)
    if not found:
        _refuse(f"{WEIGHTS} has no tensors", _SAVE)
    return found


def _by_layer(values: Mapping[str, T] | None, default: T) -> Callable[[str], T]:
    """Return what gives the value of a layer: that of the first pattern for the end of its name, as PEFT has it."""
    patterns = [(re.compile(rf"(?:.*\.)?(?:{each})$"), value) for each, value in (values or {}).items()]
    return lambda layer: next((value for pattern, value in patterns if pattern.match(layer)), default)


def _check_numbers(file: Path, tensors: _Tensors) -> None:
    """Raise `UsageError` if a number is not finite, or no layer has two matrices that are not zero."""
    with needs_packages("reading an adapter", "serve"):
        import numpy as np

    start = file.stat().st_size - max(tensor["data_offsets"][1] for tensor in tensors.values())
    zero: dict[str, bool] = {}
    for name, tensor in tensors.items():
        (size, exponent), (begin, end) = _FORMATS[tensor["dtype"]], tensor["data_offsets"]
        bits = np.fromfile(file, f"<u{size}", (end - begin) // size, offset=start + begin)
        if ((bits & exponent) == exponent).any():
            _refuse(f"its tensor {shown(name)} has NaN or infinity", "use another checkpoint of its training")
        layer = name.rpartition(".lora_")[0]
        zero[layer] = zero.get(layer, False) or not (bits << 1).any()  # without the sign
    if all(zero.values()):
        _refuse("it changes nothing: matrix A or B of each layer is zero", "use a checkpoint after its training")


def _check_tokens(folder: Path, base: Path) -> None:
    """Raise `UsageError` if the adapter comes with tokens that the base lacks: vLLM uses the tokenizer of the base."""
    if (base / _TOKENIZER).is_file() and (more := _added_tokens(folder) - _added_tokens(base)):
        hint = f"merge it into a copy of the model that has them, or remove its {_TOKENIZER} if it uses none of them"
        _refuse(f"its tokenizer has tokens that the base's has not, such as {min(more)}", hint)


def _added_tokens(folder: Path) -> set[str]:
    """Return the tokens outside of the vocabulary with their ids."""
    if not (file := folder / _TOKENIZER).is_file():
        return set()
    untrusted.check(folder, [file])
    found = untrusted.read_json(file)
    tokens = found.get("added_tokens") if isinstance(found, dict) else None
    return {f"{token.get('content')!r} ({token.get('id')})" for token in tokens or () if isinstance(token, dict)}


def _linear_layers(base: ModelFolder) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of each weight of the base that is a matrix, by name without `.weight`."""
    shapes = (found for file in base.weight_files for found in model_folder.shapes(file))
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes
        if name.endswith(".weight") and len(shape) == 2
    }


def _in_block(layer: str) -> bool:
    """Return whether a layer is in a numbered block. Tables of tokens and positions, and output layers, are not."""
    return re.search(r"\.\d+\.", f".{layer}") is not None


def _refuse(reason: str, hint: str) -> NoReturn:
    raise UsageError(reason, hint)
