"""Write an int8 checkpoint of a generative model for vLLM: W8A8, by rounding to nearest, without calibration.

    python benchmarks/prepare_int8.py MODEL_DIR OUTPUT_DIR

The weights of all linear layers but the output layer become int8 with one scale per output channel. vLLM quantizes
the activations at run time, with one scale per token. The format is that of compressed-tensors, which vLLM runs on
CPUs, and on NVIDIA GPUs from compute capability 7.5. `original_sha256` in its config.json is the digest of MODEL_DIR.
With it, `inferctl bench --model MODEL_DIR` compares the checkpoint with the original weights in fp32. The script needs
torch and safetensors, and one weight file in memory.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from inferctl.models.model import ModelFolder

# Layers that stay in the format of the checkpoint: outputs are logits, routers choose the experts.
LEFT_OUT = ("lm_head", "embed_out", "output", "gate", "router")
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is the weight of a linear layer of a transformer block."""
    parts = name.split(".")
    in_block = any(part.isdigit() for part in parts)
    return parts[-1] == "weight" and tensor.dim() == 2 and in_block and parts[-2] not in LEFT_OUT


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 [outputs, inputs] and the scales, float32 [outputs, 1]: weight is about int8 * scale."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("error: expected two folders\n\nhint: run `python benchmarks/prepare_int8.py MODEL_DIR OUTPUT_DIR`")
    source, output = map(Path, sys.argv[1:])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        sys.exit(f"error: {source} is quantized already\n\nhint: pass the folder of the original weights")
    output.mkdir(parents=True)
    placed, size, ignored = {}, 0, set()
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            if is_linear(name, tensor):
                tensors[name], tensors[f"{name}_scale"] = quantize(tensor)
            else:
                tensors[name] = tensor
                if name.endswith(".weight") and tensor.dim() == 2:
                    ignored.add(name.removesuffix(".weight"))
        save_file(tensors, output / file.name, {"format": "pt"})
        placed |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors")
    config["original_sha256"] = ModelFolder(source).digest
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS},
        },
        "ignore": sorted(ignored | {"lm_head"}),
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(set(placed.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if (
            file.is_file()
            and not (output / file.name).exists()
            and file.suffix in (".json", ".jinja", ".txt", ".model")
        ):
            shutil.copy(file, output)
    print(f"{output}: {size / 1e6:.0f} MB of weights")


if __name__ == "__main__":
    main()
