"""Adds a LoRA adapter to the weights of its base, W + scale * B A: in fp32, with one file of weights in memory.

The process of a merge is `python -m inferctl.models.merging BASE NEW_FOLDER PARENT_PID ADAPTER`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.core.errors import UsageError
from inferctl.models import adapter, conversion
from inferctl.models.adapter import WEIGHTS, Adapter
from inferctl.models.model import ModelFolder

if TYPE_CHECKING:
    import torch

# Weights in other formats are quantized: a sum needs new scales, which only the tool that quantized them makes.
_FORMATS = ("F32", "F16", "BF16")


def matrices(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and scale * B of each layer in fp32, by its name in the base."""
    from safetensors.torch import load_file

    stored, start = load_file(adapter.path / WEIGHTS), "base_model.model"
    return {
        layer: (
            stored[f"{start}.{layer}.lora_A.weight"].float(),
            stored[f"{start}.{layer}.lora_B.weight"].float() * scale,
        )
        for layer, (_, scale) in adapter.layers.items()
    }


def merge(base: ModelFolder, adapter: Adapter, target: Path) -> None:
    """Write the weights of `base` with those of an adapter into `target`, in the base's files and number formats.

    Raises `UsageError` if the base has quantized weights.
    """
    from safetensors import safe_open

    changes, formats = matrices(adapter), base.number_formats
    for layer in changes:
        if formats[f"{layer}.weight"] not in _FORMATS:
            raise UsageError(
                f"the base has {layer} in {formats[f'{layer}.weight']}, which is quantized",
                "merge with the original weights, then quantize; or serve the adapter on this base",
            )
    for file in base.weight_files:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
        for name in tensors:
            if change := changes.get(name.removesuffix(".weight")):
                a, b = change
                tensors[name] = (tensors[name].float() + b @ a).to(tensors[name].dtype)
        conversion.save(tensors, target / file.name)


def _merge(source: Path, target: Path) -> None:
    base, config = ModelFolder(source), source / "config.json"
    merge(base, adapter.read("adapter", Path(sys.argv[4]), base), target)
    for file in base.files():
        if file not in (*base.weight_files, config) and file.suffix not in (".safetensors", ".gguf"):
            conversion.copy(file, target / file.relative_to(source))
    conversion.copy(config, target / "config.json")  # without it, a folder is no model


if __name__ == "__main__":
    sys.exit(conversion.process(_merge, lambda base: base.weight_files))
