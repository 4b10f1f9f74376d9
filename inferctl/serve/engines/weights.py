"""Loads the weights of a model folder, and refuses those that are not the weights of its model.

transformers gives random values to weights that the files lack, ignores those that the model does not have, and
mentions both only in its log.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder
from inferctl.models.untrusted import inside
from inferctl.reading.space import BUFFERS, POOLER, PRETRAINING
from inferctl.serve.engine_process import failures

# Heads of classification and question answering, which vectors do not use. `head` and `decoder`: ModernBERT.
_HEADS = r"(classifier|pre_classifier|score|qa_outputs|head|decoder)\..*"
# Encoders of images and sound, and the prediction of several tokens, which the next token of a text does not use.
_OTHER_INPUTS = r"(model\.)?(vision_tower|visual|audio_tower|multi_modal_projector|mtp)\..*"
_MAY_BE_UNEXPECTED: dict[Task, tuple[str, ...]] = {
    "embed": (*BUFFERS, *PRETRAINING, POOLER, _HEADS),
    "generate": (*BUFFERS, _OTHER_INPUTS),
}
# Of a masked language model: what BERT was pretrained with, too.
_BESIDE_LOGITS = (*BUFFERS, POOLER, r"cls\.seq_relationship\..*")
# The projection that Stanford's ColBERT stores among the weights of the transformer.
_PROJECTION = r"linear\.weight"
_MAY_BE_MISSING: dict[Task, tuple[str, ...]] = {"embed": (POOLER,)}
# Of a message about wrong weights, which can be all of a model.
_NAMED = 3
# Numbers in a table of static embeddings, which a small file with a mapping can exceed.
_MAX_TABLE = 2**31
_SHOWN = 300  # characters of an error of transformers
# Numbers of safetensors files that weights can have without scales of their own, and those of stored constants.
_READABLE = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"})
_HINT = "the files may be incomplete or of another model: compare config.json with them, or download the model again"


def load(
    auto: Any,
    folder: Path,
    task: Task,
    dtype: torch.dtype,
    *,
    logits: bool = False,
    projection: bool = False,
    **options: Any,
) -> Any:
    """Return the model that a class of transformers loads for `task`, with all weights from the folder's files.

    `logits`: a masked language model with its head. `projection`: the files have a layer for token vectors too.

    It runs no code of the folder. `options` go to transformers. Raises `UsageError` if the files lack weights of the
    model, have others, or have NaN, infinity or 8-bit numbers, and if transformers cannot read the folder.
    """
    if "state_dict" not in options:
        _check_numbers(folder)
        options["pretrained_model_name_or_path"] = folder
    try:
        model, found = auto.from_pretrained(
            dtype=dtype,
            output_loading_info=True,
            # Else the exception for them names none.
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:
        if failures.out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"transformers cannot load {folder}: {reason[:_SHOWN]}",
            "use a model that transformers knows, with all of its files",
        ) from error
    scores = (*BUFFERS, *PRETRAINING, POOLER)
    unexpected = _BESIDE_LOGITS if logits else _MAY_BE_UNEXPECTED.get(task, scores)
    _check_names(folder, found, _MAY_BE_MISSING.get(task, ()), (*unexpected, *([_PROJECTION] if projection else [])))
    _check_values(folder, model)
    return model.eval()


def stored_format(folder: Path) -> torch.dtype:
    """Return the format of a model's weights: that of most of its numbers, if they are fp16 or bf16, else fp32."""
    model = ModelFolder(folder)
    if model.weights_bytes > 3 * model.parameters:
        return torch.float32
    return torch.bfloat16 if "BF16" in model.number_formats.values() else torch.float16


def of_module(folder: Path, path: str) -> dict[str, torch.Tensor]:
    """Return the weights, in fp32, in the folder `path` of a module of sentence-transformers, such as `2_Dense`.

    Raises `UsageError` if there are none, or if they have NaN, infinity or 8-bit numbers.
    """
    return {name: values.float() for name, values in _checked(folder, path, _stored(folder, path)).items()}


def linear(folder: Path, path: str) -> torch.nn.Linear:
    """Return the layer, in fp32, whose weights are in the folder `path`. Raises `UsageError` as `of_module` does."""
    stored = of_module(folder, path)
    shape = stored["linear.weight"].shape if "linear.weight" in stored else ()
    if stored.keys() != {"linear.weight", "linear.bias"} or len(shape) != 2:
        raise UsageError(f"the weights in {folder / path} are {_listed(sorted(stored))}, not those of a layer", _HINT)
    layer = torch.nn.Linear(shape[1], shape[0])
    layer.load_state_dict({name.removeprefix("linear."): values for name, values in stored.items()})
    return layer.eval()


def query_weights(folder: Path, path: str) -> Any:
    """Return the weights of all tokens in queries, from the folder `path` of a SparseStaticEmbedding: fp32, [tokens].

    Raises `UsageError` as `of_module` does.
    """
    stored = of_module(folder, path)
    if stored.keys() != {"weight"} or stored["weight"].dim() != 1:
        raise UsageError(f"the weights in {folder / path} are {_listed(sorted(stored))}, not one per token", _HINT)
    return stored["weight"].numpy()


def static_table(folder: Path, path: str) -> torch.Tensor:
    """Return the vectors of all tokens, from the folder `path` of static embeddings: fp32 [tokens + 1, dimensions].

    The last row, of the id -1, is zero. model2vec stores rows that tokens share (`mapping`), and factors of tokens
    (`weights`). Raises `UsageError` as `of_module` does, and for tensors of other names or shapes.
    """
    stored = _stored(folder, path)
    mapping = stored.pop("mapping", None) if "embeddings" in stored else None
    name, *others = sorted(_checked(folder, path, stored)) or [""]
    rows, scale = stored.get(name, torch.empty(0)), stored.get("weights")
    count = (rows if mapping is None else mapping).shape[:1].numel()
    if (
        (name, others) not in (("embedding.weight", []), ("embeddings", []), ("embeddings", ["weights"]))
        or rows.dim() != 2
        or count * rows.shape[1] > _MAX_TABLE
        or (scale is not None and scale.shape != (count,))
        or (mapping is not None and not _selects(mapping, len(rows)))
    ):
        listed = [f"{name} ({_shape(values.shape)})" for name, values in sorted(stored.items())]
        listed += [] if mapping is None else [f"mapping ({_shape(mapping.shape)})"]
        raise UsageError(f"the weights in {folder / path} are not static embeddings: {_listed(listed)}", _HINT)
    rows = rows if mapping is None else rows[mapping.long()]
    if scale is not None:  # in the format of the library: at least fp32
        rows = (rows.float() * scale[:, None]).float()
    return torch.cat([rows.float(), torch.zeros(1, rows.shape[1])])


def _selects(mapping: torch.Tensor, rows: int) -> bool:
    """Return whether a mapping has an existing row for each token."""
    whole = mapping.dim() == 1 and len(mapping) > 0 and not mapping.is_floating_point()
    return whole and int(mapping.min()) >= 0 and int(mapping.max()) < rows


def _stored(folder: Path, path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = inside(folder, f"{path or '.'}/model.safetensors")
    if not file.is_file():
        pickled = (folder / path / "pytorch_model.bin").is_file()
        raise UsageError(
            f"{folder / path} has no model.safetensors" + (" (only pickled weights, which can run code)" * pickled),
            f"convert the folder: `inferctl convert {folder} NEW_FOLDER`" if pickled else _HINT,
        )
    try:
        return load_file(file)
    except Exception as error:  # noqa: BLE001  # the library raises its own exceptions
        raise UsageError(f"{file} cannot be read: {error}", _HINT) from None


def _checked(folder: Path, path: str, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = folder / path / "model.safetensors"
    if unreadable := [name for name, values in found.items() if not values.is_floating_point() or values.itemsize < 2]:
        raise UsageError(f"{file} has numbers that are not fp32, bf16 or fp16: {_listed(unreadable)}", _HINT)
    if bad := [name for name, values in found.items() if not torch.isfinite(values).all()]:
        raise UsageError(f"weights of {folder / path} have NaN or infinity: {_listed(bad)}", _HINT)
    return found


def _check_numbers(folder: Path) -> None:
    """Raise `UsageError` for quantized weights, which transformers would read without their scales, or need a library.

    That of generation reads those that it can.
    """
    model = ModelFolder(folder)
    method = model.config.get("quantization_config")
    unreadable = {name: each for name, each in model.number_formats.items() if each not in _READABLE}
    if method is None and not unreadable:
        return
    what = _listed([f"{name} ({number})" for name, number in unreadable.items()]) if unreadable else "all of them"
    raise UsageError(
        f"the weights of {folder} are quantized: {what}", "use the model with weights in fp32, bf16 or fp16"
    )


def _check_names(
    folder: Path, found: dict[str, Any], may_be_missing: tuple[str, ...], may_be_unexpected: tuple[str, ...]
) -> None:
    missing = _others(found["missing_keys"], may_be_missing)
    unexpected = _others(found["unexpected_keys"], may_be_unexpected)
    shapes = [f"{name} ({_shape(stored)}, not {_shape(own)})" for name, stored, own in sorted(found["mismatched_keys"])]
    parts = [f"lack {_listed(missing)}"] if missing else []
    parts += [f"have another shape than the model: {_listed(shapes)}"] if shapes else []
    parts += [f"include others than those of the model: {_listed(unexpected)}"] if unexpected else []
    if parts:
        raise UsageError(f"the weights of {folder} {'; they '.join(parts)}", _HINT)


def _check_values(folder: Path, model: Any) -> None:
    """Raise `UsageError` for NaN, and for infinity, which fp16 alone may have for larger numbers in the files."""
    # A sum is not finite if a value is not. It needs one pass and no memory, and is exact enough to skip all others.
    bad = [
        name
        for name, values in model.named_parameters()
        if not torch.isfinite(values.detach().sum(dtype=torch.float32)) and _is_bad(values.detach())
    ]
    if bad:
        raise UsageError(f"weights of {folder} have NaN or infinity: {_listed(bad)}", _HINT)


def _is_bad(values: torch.Tensor) -> bool:
    unwanted = values.isnan() if values.dtype == torch.float16 else ~values.isfinite()
    return bool(unwanted.any())


def _others(names: Collection[str], harmless: tuple[str, ...]) -> list[str]:
    pattern = re.compile("|".join(harmless) or r"(?!)")
    return sorted(name for name in names if not pattern.fullmatch(name))


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _shape(sizes: Collection[int]) -> str:
    return "x".join(map(str, sizes))
