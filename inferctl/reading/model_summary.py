"""How the server uses a model, from its small files: no weights, no tokenizer, no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferctl.config.spec import Task
from inferctl.models.merge import ORIGIN
from inferctl.reading import architecture, task_config
from inferctl.reading.modules import Dense, read_object
from inferctl.reading.task_config import TaskConfig


def read(task: Task, folder: Path) -> dict[str, Any]:
    """Return how the server uses a model: `of_config`, and what its configuration does not have.

    `direction`: causal or bidirectional, None if the type of the model decides. `add_eos_token`: what
    `tokenizer_config.json` says, None if it matters not. `own_code`: classes of the repository, which are never run.
    Raises `UsageError` with the reason if the model is not supported. For generation, vLLM decides.
    """
    code = read_object(folder / "config.json").get("auto_map")
    own_code = sorted(map(str, code)) if isinstance(code, dict) else []
    if task == "generate":
        merged = read_object(folder / ORIGIN)
        return {"own_code": own_code} | ({"merged": merged} if merged else {})
    config = task_config.read(task, folder)
    last = "last" in config.pooling
    return {
        **of_config(config),
        "direction": _direction(architecture.native_config(folder)),
        "add_eos_token": read_object(folder / "tokenizer_config.json").get("add_eos_token") if last else None,
        "own_code": own_code,
    }


def of_config(config: TaskConfig) -> dict[str, Any]:
    """Return what `GET /info` says of the configuration of a model folder, under `model`."""
    return {
        "max_tokens": config.max_tokens,
        "pooling": "+".join(config.pooling) or None,
        "dense": [asdict(layer) for layer in config.layers if isinstance(layer, Dense)],
        **config.facts,
    }


def line(found: dict[str, Any]) -> str:
    """Return the line that describes what `read` returned; empty if there is nothing to say."""
    parts = ["static embeddings"] if found.get("static") else []
    if merged := found.get("merged"):
        parts.append(f"{merged.get('base')} with the adapter {merged.get('adapter')} in its weights")
    if (trained := list(found.get("trained_outputs", ("dense",)))) != ["dense"]:
        parts.append(f"outputs {', '.join(trained)}")
    if found.get("pooling") and not found.get("logit_score"):
        parts.append(f"{found['pooling']} pooling" + (" (assumed)" if found.get("pooling_assumed") else ""))
    parts += [f"dense {layer['in_features']} to {layer['out_features']}" for layer in found.get("dense", ())]
    if "normalize" in found and found.get("pooling"):
        parts.append("normalized" if found["normalize"] else "not normalized")
    if found.get("truncate_dim"):
        parts.append(f"{found['truncate_dim']} dimensions")
    if found.get("template"):
        parts.append("pairs in its chat template" + ", with an instruction" * found["takes_instruction"])
    if found.get("logit_score"):
        parts.append("logits of the last token")
    if "activation" in found:
        labels = f" of {len(found['labels'])} labels" if "labels" in found else ""
        parts.append(f"scores{labels} by {found['activation']}")
    if "max_tokens" in found:
        parts.append(f"up to {found['max_tokens']:,} tokens")
    if found.get("add_eos_token") is not None:
        parts.append("EOS appended" if found["add_eos_token"] else "no EOS")
    if found.get("direction"):
        parts.append(f"{found['direction']} attention")
    if names := found.get("prompts", {}).get("names"):
        parts.append(f"prompts {', '.join(names)} (default: {found['prompts']['default'] or 'none'})")
    return ", ".join(parts)


def _direction(config: dict[str, Any]) -> str | None:
    """Return what `config.json` says about the direction of attention; None if the type of the model decides."""
    both = config.get("use_bidirectional_attention")
    causal = config.get("is_causal", not both if isinstance(both, bool) else None)
    return ("causal" if causal else "bidirectional") if isinstance(causal, bool) else None
