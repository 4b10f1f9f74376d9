"""How the server uses a model, from its small files: no weights, no tokenizer, no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferctl.config.spec import Task
from inferctl.serve import task_config
from inferctl.serve.embedding_config import read_object


def read(task: Task, folder: Path) -> dict[str, Any]:
    """Return how the server uses a model: each field of its configuration, and what the configuration does not have.

    `prompts`: by name. `default_prompt`: the name of the one that every input gets, or None. `appends_eos`: whether
    `tokenizer_config.json` asks for an EOS token, None if it does not say. `bidirectional`: whether `config.json`
    makes a decoder attend both ways, None if it does not say. `own_code`: classes of the repository, which are never
    run. Raises `UsageError` with the reason if the model is not supported.
    """
    config = read_object(folder / "config.json")
    settings = read_object(folder / "config_sentence_transformers.json")
    prompts, code = settings.get("prompts"), config.get("auto_map")
    found: dict[str, Any] = {
        "prompts": {str(name): str(text) for name, text in prompts.items()} if isinstance(prompts, dict) else {},
        "default_prompt": settings.get("default_prompt_name"),
        "appends_eos": read_object(folder / "tokenizer_config.json").get("add_eos_token"),
        "bidirectional": _bidirectional(config),
        "own_code": sorted(map(str, code)) if isinstance(code, dict) else [],
    }
    if task != "generate":
        found |= asdict(task_config.read(task, folder))
    return found


def line(found: dict[str, Any]) -> str:
    """Return the line that describes what `read` returned; empty if there is nothing to say."""
    parts = []
    if "pooling" in found:
        parts += [f"{found['pooling']} pooling" + (" (assumed)" if found.get("assumed") else "")]
        parts += ["normalized" if found["normalize"] else "not normalized"]
    if "activation" in found:
        parts += [f"scores by {found['activation']}"]
    if "max_tokens" in found:
        parts += [f"up to {found['max_tokens']:,} tokens"]
    if found["appends_eos"] is not None:
        parts += ["EOS appended" if found["appends_eos"] else "no EOS"]
    if found["bidirectional"] is not None:
        parts += ["attends both ways" if found["bidirectional"] else "causal"]
    prompts = found["prompts"]
    if prompts:
        parts += [f"prompts {', '.join(prompts)} (default: {found['default_prompt'] or 'none'})"]
    return ", ".join(parts)


def _bidirectional(config: dict[str, Any]) -> bool | None:
    """Return what `config.json` says about the direction of attention; None if the type of the model decides."""
    if isinstance(causal := config.get("is_causal"), bool):
        return not causal
    both = config.get("use_bidirectional_attention")
    return both if isinstance(both, bool) else None
