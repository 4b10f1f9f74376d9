"""8-bit linear layers on CUDA with LLM.int8 of bitsandbytes (weights and activations). CPUs use `onednn.Int8Linear`."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from inferctl.core.errors import NotReadyError, install_hint

# From the LLM.int8 paper (Dettmers et al., 2022): columns with a larger activation are not in the 8-bit product.
_OUTLIER_THRESHOLD = 6.0
METHOD = {"cuda": "bitsandbytes LLM.int8", "cpu": "oneDNN int8"}


def quantize(model: Any) -> None:
    """Make the linear layers of `model` 8-bit, in place. bitsandbytes quantizes them when they are moved to the GPU.

    Raises `NotReadyError` if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotReadyError("int8 on CUDA needs bitsandbytes, which is not installed", install_hint("int8"))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.nn import Linear8bitLt

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                options = {"bias": child.bias is not None, "has_fp16_weights": False, "threshold": _OUTLIER_THRESHOLD}
                layer = Linear8bitLt(child.in_features, child.out_features, **options)
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.eval())
