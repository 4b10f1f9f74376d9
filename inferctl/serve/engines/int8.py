"""8-bit linear layers. CUDA: bitsandbytes' LLM.int8 (weights and activations). CPU: torchao's 8-bit weights, products in the format around them.

On a CPU LLM.int8 ran at a third of the speed of bf16 and torchao's dynamic 8-bit activations at half of it, with lower cosines than 8-bit
weights, which run about as fast as bf16 in half the memory.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from inferctl.errors import NotReadyError

# From the LLM.int8 paper (Dettmers et al., 2022): columns with a larger activation stay out of the 8-bit product.
_OUTLIER_THRESHOLD = 6.0
METHOD = {"cuda": "bitsandbytes LLM.int8", "cpu": "torchao int8 weights"}


def quantise(model: Any, kind: str) -> None:
    """Make the linear layers of `model` 8-bit, in place, before it is moved to its device. `kind` is cuda or cpu.

    Raises `NotReadyError` when the library for it is not installed.
    """
    library = "bitsandbytes" if kind == "cuda" else "torchao"
    if importlib.util.find_spec(library) is None:
        raise NotReadyError(f"int8 on {kind} needs {library}, which is not installed", "pip install 'inferctl[int8]'")
    logging.getLogger(library).setLevel(logging.ERROR)
    if kind == "cuda":
        _llm_int8(model)
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))


def _llm_int8(module: Any) -> None:
    """Replace every linear layer; bitsandbytes quantises the weights when they are moved to the GPU."""
    from bitsandbytes.nn import Linear8bitLt

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            layer = Linear8bitLt(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                has_fp16_weights=False,
                threshold=_OUTLIER_THRESHOLD,
            )
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer.eval())
        else:
            _llm_int8(child)
