"""Writes adapters of PEFT with random weights, and wrong, foreign and hostile ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferctl.models import model
from tests.models.model_folders import LLAMA, write_model

CONFIG: dict[str, Any] = json.loads(
    """{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
    "bias": "none", "lora_dropout": 0.1, "inference_mode": true, "qalora_group_size": 16, "loftq_config": {}}"""
)
WEIGHTS = "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
TOKENS = json.dumps({"added_tokens": [{"id": 7, "content": "<tool>"}]}).encode()
# Changes the configuration and the tensors, by name.
Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def write_base(folder: Path) -> Path:
    """Write a decoder of two layers, which nothing can compute."""
    shapes = {"model.embed_tokens.weight": [100, 32], "model.norm.weight": [32]}
    for number in range(2):
        sizes = {"self_attn.q_proj": [32, 32], "self_attn.v_proj": [16, 32], "mlp.down_proj": [32, 64]}
        shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}
    write_model(folder, shapes)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_adapter(folder: Path, base: Path, edit: Edit = lambda *_: None, seed: int = 0) -> Path:
    """Write an adapter for `base`, changed by `edit`."""
    import numpy as np
    from safetensors.numpy import save_file

    rng, tensors, config = np.random.default_rng(seed), dict[str, Any](), dict(CONFIG)
    for name, shape in model.shapes(base / "model.safetensors"):
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if layer.endswith(("q_proj", "v_proj")):
            tensors[f"{layer}.lora_A.weight"] = rng.normal(0, 0.05, (4, shape[1])).astype(np.float32)
            tensors[f"{layer}.lora_B.weight"] = rng.normal(0, 0.5, (shape[0], 4)).astype(np.float32)
    edit(config, tensors)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


def write_wrong(folder: Path, base: Path, case: str) -> Path:
    """Write an adapter of `WRONG` or `HOSTILE`."""
    if case in WRONG:
        return write_adapter(folder, base, WRONG[case][0])
    HOSTILE[case][0](write_adapter(folder, base))
    return folder


def settings(**values: Any) -> Edit:
    return lambda config, _tensors: config.update(values)


def renamed(old: str, new: str) -> Edit:
    def rename(_config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return rename


def changed(change: Callable[[Any], Any], end: str = "") -> Edit:
    """Replace each tensor whose name ends with `end` by `change` of it."""
    return lambda _config, tensors: tensors.update(
        {name: change(value) for name, value in tensors.items() if name.endswith(end)}
    )


def added(name: str, *shape: int, **values: Any) -> Edit:
    """Add a tensor, and `values` to the configuration."""
    import numpy as np

    tensor = {f"base_model.model.{name}": np.ones(shape, np.float32)}
    return lambda config, tensors: (config.update(values), tensors.update(tensor))


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def linked(name: str) -> Callable[[Path], object]:
    """Move a file out of the folder, and leave a link to it."""
    return lambda folder: (folder / name).symlink_to((folder / name).rename(folder.with_name(f"{folder.name}-{name}")))


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


# What is wrong -> the change and a part of the reason. vLLM 0.32 loads most of them, and answers under their names.
WRONG: dict[str, tuple[Edit, str]] = {
    "names of a multimodal wrapper": (renamed("model.layers", "language_model.model.layers"), "no linear layer"),
    "names of a model without its head": (renamed("model.model.model.", "model.model."), "no linear layer"),
    "names without the prefix of PEFT": (renamed("base_model.model.", ""), "is not base_model.model.LAYER"),
    "a layer that the base has not": (renamed("layers.0.", "layers.99."), "no linear layer"),
    "a smaller base": (changed(lambda each: each[:, : each.shape[1] // 2].copy(), "A.weight"), "the shape"),
    "a larger base": (changed(lambda each: each.repeat(2, 1), "A.weight"), "the shape"),
    "another rank than its tensors": (settings(r=2), "requires \\[2, "),
    "tensors of layers that are no targets": (settings(target_modules=["q_proj"]), "leaves out"),
    "layers_to_transform": (settings(layers_to_transform=[0]), "layers_to_transform"),
    "fan_in_fan_out": (settings(fan_in_fan_out=True), "fan_in_fan_out"),
    "another method": (settings(peft_type="LOHA"), "peft_type"),
    "another task": (settings(task_type="SEQ_CLS"), "task_type"),
    "a field of a later PEFT": (settings(use_later=True), "use_later"),
    "experts that are no modules": (settings(target_parameters=["experts.up"]), "target_parameters"),
    "new tokens": (settings(trainable_token_indices=[1]), "trainable_token_indices"),
    "a whole embedding": (added("model.embed_tokens.base_layer.weight", 4, 4), "is not base_model"),
    "B is zero": (changed(lambda each: 0 * each, "B.weight"), "changes nothing"),
    "a scale of zero": (settings(lora_alpha=0), "lora_alpha"),
    "NaN": (changed(lambda each: each * float("nan"), "A.weight"), "NaN"),
    "integers": (changed(lambda each: each.astype("int8")), "I8"),
    "no tensors": (lambda _config, tensors: tensors.clear(), "has no tensors"),
    "an output layer": (added("lm_head.lora_A.weight", 4, 4), "lm_head"),
    "A without B": (
        lambda _config, tensors: tensors.pop(f"base_model.model.{Q}.lora_B.weight"),
        "without the other matrix",
    ),
    "DoRA": (added(f"{Q}.lora_magnitude_vector", 4, use_dora=True), "use_dora"),
    "DoRA, not said": (added(f"{Q}.lora_magnitude_vector", 4), "is not base_model"),
    "modules_to_save": (added("lm_head.weight", 4, 4, modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (settings(bias="all"), "bias"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "a rank of 10^9": (settings(r=10**9), "its r is"),
    "a rank of 10^9 in a pattern": (settings(rank_pattern={"q_proj": 10**9}), "rank_pattern"),
    "a pattern that explodes": (settings(alpha_pattern={r"((\w|\.)+)+!": 8}), "alpha_pattern"),
}
# The same of the files.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "new tokens, in its tokenizer": (written("tokenizer.json", TOKENS), "tokens that the base's has not"),
    "a configuration outside": (linked("adapter_config.json"), "outside of the model folder"),
    "weights outside": (linked(WEIGHTS), "outside of the model folder"),
    "a pickle": (pickled, "a pickle"),
    "a pipe": (pipe, "a pipe"),
    "a huge header": (written(WEIGHTS, struct.pack("<Q", 2**40)), "not a complete safetensors"),
    "half of a file": (written(WEIGHTS, struct.pack("<Q", 20) + b'{"a":'), "not a complete safetensors"),
    "nested JSON": (written("adapter_config.json", b"[" * 200_000), "cannot be read"),
    "no table": (written("adapter_config.json", b"[]"), "valid dictionary"),
}
