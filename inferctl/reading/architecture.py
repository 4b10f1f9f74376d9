"""What the `config.json` of an encoder says to transformers: the class of its own, and the direction of attention.

A model with code of its own (`auto_map`) computes what that code says. The code is never run. transformers replaces it
by its class of the same `model_type`, without a word, which is right only for the models that are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder, architecture
from inferctl.reading.modules import read_object

# Types that transformers computes as the code of their first repositories did, with the starts of its class names.
_ADOPTED = {"eurobert": ("EuroBert",), "gte": ("New", "Gte"), "nomic_bert": ("NomicBert",)}
# Types of repositories for which transformers has the same model by another name.
_RENAMED = {"new": "gte", "llama_bidirec": "llama"}
# Decoders whose own code attends in both directions, and otherwise is that of their type.
_BOTH_WAYS = {"modeling_gritlm7b": "mistral", "llama_bidirectional_model": "llama"}
# The names of the first NomicBert's config.json, and those that transformers reads.
_NOMIC_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
# What the own code of a type can do, and its class of transformers cannot: only these values are the same.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "gte": {
        "position_embedding_type": ("rope",),
        "layer_norm_type": ("layer_norm",),
        "logn_attention_scale": (False, None),
    },
    "nomic_bert": {
        "activation_function": ("swiglu", "silu"),
        "causal": (False, None),
        "moe_every_n_layers": (0, None),
        "num_experts": (0, None),
        "prenorm": (False, None),
        "qkv_proj_bias": (False, None),
        "rotary_emb_fraction": (1, None),
        "rotary_emb_interleaved": (False, None),
        "rotary_emb_scale_base": (None,),
        "rotary_scaling_factor": (None,),
        "use_rms_norm": (False, None),
    },
}
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_MANY_LAYERS = 200  # of the largest published models, about 130
# The width of gte-Qwen2-1.5B and its descendants, whose own code and config.json contradict each other.
_CONTRADICTION = 1536
# Types whose vectors depend on padding or chance, and those that turn sparse attention off after the first short text.
_MIXING = ("nystromformer", "yoso")
_SPARSE = ("big_bird", "bigbird_pegasus")
_HINT = "use a model that transformers computes itself; a copy of this one for it may exist"


def native_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json` that makes transformers compute this encoder, without code of its own.

    Raises `UsageError` if transformers would compute something else, and for adapters, which would be left out.
    """
    config = read_object(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder} has an adapter (adapter_config.json), which is not supported",
            "merge it into the weights: `PeftModel.merge_and_unload()` of peft, then `save_pretrained(folder)`",
        )
    _check_layers(folder, config)
    if not isinstance(config.get("is_causal", False), bool):
        raise UsageError(f"{folder} has `is_causal: {config['is_causal']}` in config.json", "write true or false")
    if _has_longrope(config):
        raise UsageError(
            f"{folder} has positions (longrope) that depend on the longest text of a batch, which is not supported",
            _HINT,
        )
    kind = str(config.get("model_type", ""))
    if kind in _MIXING or (kind in _SPARSE and config.get("attention_type", "block_sparse") != "original_full"):
        raise UsageError(
            f"the attention of {folder} ({kind}) depends on the other texts of a batch, or on earlier ones; it is not "
            "supported",
            "use a model with full attention, or set `attention_type: original_full` if BigBird was trained so",
        )
    code = _own_code(config)
    found = {key: value for key, value in config.items() if key != "auto_map"}
    module, _, name = code.rpartition("--")[2].rpartition(".")
    if kind in _RENAMED:
        found["model_type"] = _RENAMED[kind]
    adopted = str(found.get("model_type", ""))
    if _BOTH_WAYS.get(module) == adopted or kind == "llama_bidirec":
        pooling = "avg" if (folder / "modules.json").is_file() else config.get("pooling", "avg")
        if architecture(config).endswith("ForSequenceClassification") or pooling != "avg":
            raise UsageError(f"the code of {folder} pools in its own way ({pooling}), which is not supported", _HINT)
        return found | {"is_causal": False}
    if (module, name, kind) == ("modeling_qwen", "Qwen2Model", "qwen2"):
        if config.get("is_causal") is not False or config.get("hidden_size") == _CONTRADICTION:
            raise UsageError(
                f"the code of {folder} ({code}) may attend in another direction than its config.json says",
                "find out which one is right, set `is_causal` in config.json, and remove `auto_map`",
            )
        return found
    if code and not name.startswith(_ADOPTED.get(adopted, ())):
        raise UsageError(f"{folder} has code of its own ({code}), which is not run", _HINT)
    if adopted in _ONLY:
        _check_settings(folder, adopted, config)
    if adopted == "nomic_bert":
        return {_NOMIC_NAMES.get(key, key): value for key, value in found.items()}
    if adopted == "gte" and (scaling := config.get("rope_scaling")):
        found.pop("rope_scaling")
        found["rope_parameters"] = _gte_rope(folder, config, scaling)
    return found


def _has_longrope(config: Mapping[str, Any]) -> bool:
    """Return whether positions are scaled by the length of a text, in all layers or in those of one kind."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return False
    names = {"longrope", "su", *(["yarn"] if config.get("model_type") in ("phi3", "phi4_multimodal") else [])}
    each = [scaling, *(value for value in scaling.values() if isinstance(value, Mapping))]
    return any(names & {str(found.get("rope_type")), str(found.get("type"))} for found in each)


def _own_code(config: Mapping[str, Any]) -> str:
    """Return the class of the model's own code, such as `modeling_x.XModel`; empty without code for a model."""
    listed = config.get("auto_map")
    if not isinstance(listed, Mapping):
        return ""
    names = sorted((key for key in listed if str(key).startswith("AutoModel")), key=len)
    return str(listed[names[0]]) if names else ""


def _check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `UsageError` for many layers without tensors: transformers makes layers until the memory is full."""
    tensors = len(ModelFolder(folder).number_formats)
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in _LAYERS:
            if isinstance(layers := part.get(name), int) and layers > max(tensors, _MANY_LAYERS):
                raise UsageError(
                    f"{folder} has `{name}: {layers}` in config.json, and its weights have {tensors} tensors in all",
                    "download the model again",
                )


def _check_settings(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    for name, values in _ONLY[kind].items():
        if name in config and config[name] not in values:
            raise UsageError(
                f"{folder} has `{name}: {config[name]}` in config.json, which transformers does not compute for {kind}",
                _HINT,
            )


def _gte_rope(folder: Path, config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embeddings of gte with "ntk" scaling, as transformers spells them.

    The base grows by the factor, and all frequencies shrink by factor^(2 / head size) (https://kexue.fm/archives/9706).
    """
    factor, size = scaling.get("factor"), config.get("hidden_size", 0) / max(1, config.get("num_attention_heads", 1))
    if scaling.get("type") != "ntk" or scaling.get("mixed_b") is not None or not factor or not size:
        raise UsageError(f"{folder} has `rope_scaling: {scaling}` in config.json, which is not supported", _HINT)
    theta = config.get("rope_theta", 10_000) * factor
    return {"rope_type": "linear", "factor": factor ** (2 / size), "rope_theta": theta}
