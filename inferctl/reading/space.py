"""The names of vector spaces: vectors can be compared with each other if the spaces have one name.

A name is made of the *definition* of a space, which is what a model folder says: values of the weights, tokenizer,
pooling, prompts, lengths. It does not depend on the *execution*, which moves vectors by 1e-6 to 1e-2: precision,
engine, hardware, batch, versions. Nor does it depend on how files are named, divided or formatted. Read without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.models.model import ModelFolder, tensors
from inferctl.reading import architecture
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.modules import Layer, read_object, tokenizer_file
from inferctl.reading.outputs import Output

HEADER = "x-inferctl-space"
# Tensors of checkpoints that no vector depends on: constants, the pooler, and heads of the pretraining.
BUFFERS = (
    r"(.*\.)?(position_ids|token_type_ids)",  # constants that older versions of transformers stored
    r"(.*\.)?rotary_emb\.inv_freq",  # computed from config.json
    r"(.*\.)?num_batches_tracked",  # counts the batches of the training
)
# Heads that an encoder was pretrained with, which neither its vectors nor its scores use. With the architecture that
# stores each one.
PRETRAINING = (
    r"cls\..*",  # BERT, DeBERTa: masked tokens, next sentence
    r"lm_head\..*",  # RoBERTa, XLM-R, MPNet, decoders
    r"vocab_(transform|layer_norm|projector)\..*",  # DistilBERT
    r"(discriminator|generator)_predictions\..*",  # ELECTRA
    r"generator_lm_head\..*",  # ELECTRA
    r"(predictions|sop_classifier)\..*",  # ALBERT
    r"(lm|mask)_predictions\..*",  # DeBERTa
)
# Embeddings are pooled from the last layer, without the model's own pooler.
POOLER = r"(.*\.)?pooler\..*"
# Keys of config.json that say nothing of what is computed for a vector.
_NOT_COMPUTED = re.compile(
    r"_.*|architectures|auto_map|.*dtype|transformers_version|torchscript|use_cache|id2label|label2id|num_labels"
    r"|(?!token_dropout).*dropout.*"  # that of ESM scales the vectors of words
    r"|initializer_.*|gradient_checkpointing|output_(attentions|hidden_states)|return_dict|problem_type|pooler_.*"
    r"|finetuning_task|task_specific_params|is_matryoshka|matryoshka_dimensions|attn_implementation"
    r"|.*(bos|eos)_token_id"
)
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_PART = 2**22  # numbers of a tensor that are hashed at a time: 16 MiB


@dataclass(frozen=True)
class Space:
    """`definition`: what the space is, in parts. It is data for JSON: settings, and SHA-256 of what is long."""

    output: Output
    definition: Mapping[str, Any]

    @cached_property
    def name(self) -> str:
        """Such as `dense_01e6bd79f7dfd5be`: the output, and 16 hexadecimal digits of the definition's SHA-256."""
        return f"{self.output}_{_digest(self.definition)[:16]}"

    @property
    def described(self) -> dict[str, Any]:
        """The name and the definition, as `/info` and receipts have them."""
        return {"name": self.name, "definition": dict(self.definition)}

    def variant(self, **parts: Any) -> Space:
        """Return the space of vectors that are cut (`dimensions`), or of another length than usual (`normalized`)."""
        return replace(self, definition={**self.definition, **parts})


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the parts in which two definitions differ, with both values, None for a part that one lacks.

    An object in a definition is compared part by part: `config.hidden_act`.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for part in dict.fromkeys([*one, *other]):
        before, after = one.get(part), other.get(part)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= {f"{part}.{inner}": pair for inner, pair in differences(before, after).items()}
        elif before != after:
            found[part] = before, after
    return found


def read(folder: Path, config: EmbeddingConfig) -> dict[Output, Space]:
    """Return the spaces of all outputs of a model folder, whose configuration is `config`.

    It reads all weights.
    """
    unused = [*BUFFERS, POOLER, *(() if config.has_logits else PRETRAINING)]
    model = ModelFolder(folder)
    common = {
        "weights": _weights(model.weight_files, unused),
        "tokenizer": _tokenizer(folder, config),
        "max_tokens": config.max_tokens,
        "lower_case": config.lower_case,
        "prompts": dict(sorted(config.prompts.texts.items())),
        "default_prompt": config.prompts.default,
        "prompts_pooled": config.prompts.pooled,
        **({"static": True} if config.static else {"config": _computed(architecture.native_config(folder))}),
    }
    own: dict[Output, Mapping[str, Any]] = {}
    if config.pooling:
        own["dense"] = {"pooling": list(config.pooling), "layers": _layers(folder, config.layers)}
        if config.truncate_dim is not None:
            own["dense"] = {**own["dense"], "truncate_dim": config.truncate_dim}
    if config.sparse:
        folders = {"folder": config.sparse.folder, "query_weights": config.sparse.query_weights}
        read_weights = {name: each and _weights(_files(folder / each)) for name, each in folders.items()}
        own["sparse"] = {"sparse": {**asdict(config.sparse), **read_weights}}
    if config.tokens:
        own["tokens"] = {"tokens": {**asdict(config.tokens), "layers": _layers(folder, config.tokens.layers)}}
    return {output: Space(output, _plain({**common, **parts})) for output, parts in own.items()}


def _layers(folder: Path, layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Return the layers after the pooling: kind, settings, and the digest of their weights in place of the folder."""
    found = []
    for layer in layers:
        settings = {"kind": type(layer).__name__, **asdict(layer)}
        if (path := settings.pop("folder", None)) is not None:
            settings["weights"] = _weights(_files(folder / path))
        found.append(settings)
    return found


def _files(folder: Path) -> list[Path]:
    """Return the weight files of the folder of a module."""
    return sorted(folder.glob("*.safetensors"))


def _weights(files: Iterable[Path], unused: Iterable[str] = ()) -> str:
    """Return the SHA-256 of names, shapes and values of the tensors, in the order of their names.

    Equal values are equal in all formats of numbers. A prefix that all names have in common, such as `bert.`, does not
    count: transformers writes it for a model with a head.
    """
    ignored, calls = re.compile("|".join(unused) or "(?!)"), {}
    with ThreadPool(2) as threads:  # SHA-256 runs without the lock of the interpreter
        for file in files:
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in tensors(file):
                if not ignored.fullmatch(name):
                    calls[name] = threads.apply_async(_tensor, (file, start, entry))
        first = {name.partition(".")[0] for name in calls}
        cut = len(first.pop()) + 1 if len(first) == 1 and len(calls) > 1 else 0
        return _digest({name[cut:]: call.get() for name, call in sorted(calls.items())})


def _tensor(file: Path, start: int, entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a tensor: its shape, and its values in fp32, or as they are if they are whole numbers."""
    found = hashlib.sha256(json.dumps(entry["shape"]).encode())
    begin, end = entry["data_offsets"]
    kind = entry["dtype"]
    most = {"F64": 8, "F32": 4}.get(kind, 2) * _PART
    with file.open("rb") as stream:
        stream.seek(start + begin)
        while part := stream.read(min(most, start + end - stream.tell())):
            if kind == "BF16":
                found.update(np.left_shift(np.frombuffer(part, "<u2"), 16, dtype=np.uint32))
            elif kind in _NUMBERS and kind != "F32":
                found.update(np.frombuffer(part, _NUMBERS[kind]).astype("<f4").data)
            else:
                found.update(part)
    return found.hexdigest()


def _tokenizer(folder: Path, config: EmbeddingConfig) -> str:
    """Return the SHA-256 of what the tokenizer does. The server truncates and pads itself."""
    found = read_object(tokenizer_file(folder, config.static))
    parts = {name: value for name, value in found.items() if name not in ("truncation", "padding", "version")}
    if "last" in config.pooling:  # see `tokenizer_files.missing_eos`
        settings = read_object(folder / "tokenizer_config.json")
        parts["eos"] = [settings.get("add_eos_token"), settings.get("eos_token")]
    return _digest(parts)


def _computed(value: Any) -> Any:
    """Return config.json without what does not matter, also in its objects."""
    if not isinstance(value, Mapping):
        return value
    return {key: _computed(each) for key, each in value.items() if not _NOT_COMPUTED.fullmatch(str(key))}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
