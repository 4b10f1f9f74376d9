"""The embedding configuration of a model folder: pooling, normalization, prompt, longest input. Read without torch.

The formats are those of the files that sentence-transformers writes (`modules.json`, `1_Pooling/config.json`,
`sentence_bert_config.json`, `config_sentence_transformers.json`) and of transformers' `config.json` and
`tokenizer_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder
from inferctl.models.untrusted import read_json

Pooling = Literal["mean", "cls", "last"]

_POOLING_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_POOLING_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
# RoBERTa-like models number positions from the padding index + 1, which reduces the usable positions.
_OFFSET_TYPES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text"}
)
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class EmbeddingConfig:
    """How a model turns token vectors into an embedding.

    `max_tokens` includes special tokens. `assumed`: the folder does not name a pooling, so mean pooling is used.
    `matryoshka`: the dimensions that vectors can be truncated to, empty if the model was not trained for truncation,
    None if any number is allowed.
    """

    pooling: Pooling
    normalize: bool
    max_tokens: int
    prompt: str = ""
    lower_case: bool = False
    assumed: bool = False
    matryoshka: tuple[int, ...] | None = ()


def read(folder: Path, max_input_tokens: int | None = None) -> EmbeddingConfig:
    """Return the configuration of a model folder. Raises `UsageError` for an unsupported module or pooling."""
    pooling, normalize, assumed = _pooling(folder, ModelFolder(folder).modules)
    return EmbeddingConfig(
        pooling=pooling,
        normalize=normalize,
        assumed=assumed,
        matryoshka=_matryoshka(read_object(folder / "config.json")),
        **input_settings(folder, max_input_tokens),
    )


def input_settings(folder: Path, max_input_tokens: int | None) -> dict[str, Any]:
    """Return `max_tokens`, `prompt` and `lower_case` of a model folder of any task."""
    modules = ModelFolder(folder).modules
    transformer = folder / next((str(m.get("path", "")) for m in modules if _kind(m) == "Transformer"), "")
    bert = read_object(transformer / "sentence_bert_config.json")
    longest = _longest(folder, read_object(folder / "config.json"), bert)
    settings = read_object(folder / "config_sentence_transformers.json")
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "", "") or ""
    return {
        "max_tokens": min(longest, max_input_tokens or longest),
        "prompt": str(prompt),
        "lower_case": bool(bert.get("do_lower_case", False)),
    }


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def _pooling(folder: Path, modules: list[dict[str, Any]]) -> tuple[Pooling, bool, bool]:
    if not modules:
        return "mean", False, True
    unknown = [_kind(m) for m in modules if _kind(m) not in {"Transformer", "Pooling", "Normalize"}]
    if unknown:
        raise UsageError(
            f"{folder} has a {unknown[0]} module, which is not supported",
            "use a model with only Transformer, Pooling and Normalize modules",
        )
    module = next((m for m in modules if _kind(m) == "Pooling"), None)
    normalize = any(_kind(m) == "Normalize" for m in modules)
    if module is None:
        return "mean", normalize, True
    config = read_object(folder / str(module.get("path", "")) / "config.json")
    mode_name = config.get("pooling_mode")
    chosen = (
        [str(mode_name)]
        if isinstance(mode_name, str)
        else [k for k, v in config.items() if k.startswith("pooling_mode_") and v]
    )
    known = {**_POOLING_FLAGS, **_POOLING_NAMES}
    if len(chosen) != 1 or chosen[0] not in known:
        raise UsageError(
            f"pooling {' + '.join(chosen) or 'none'} of {folder} is not supported",
            "use a model with mean, cls or last-token pooling",
        )
    mode: Any = known[chosen[0]]
    return mode, normalize, False


def _longest(folder: Path, config: dict[str, Any], bert: dict[str, Any]) -> int:
    tokenizer = read_object(folder / "tokenizer_config.json")
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and config.get("model_type") in _OFFSET_TYPES:
        positions -= int(config.get("pad_token_id") or 0) + 1
    limits = [positions, bert.get("max_seq_length") or tokenizer.get("model_max_length")]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT]
    return min(known, default=512)


def _matryoshka(config: dict[str, Any]) -> tuple[int, ...] | None:
    dimensions = config.get("matryoshka_dimensions")
    if isinstance(dimensions, list):
        return tuple(int(d) for d in dimensions)
    return None if config.get("is_matryoshka") else ()


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is none. Raises `UsageError` if it cannot be read."""
    data = read_json(path) if path.is_file() else None
    return data if isinstance(data, dict) else {}
