"""8-bit weights and activations by bitsandbytes' LLM.int8: linear layers only, outlier columns kept in 16 bits. Runs on CUDA and on CPUs."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from inferctl.errors import NotReadyError

# From the LLM.int8 paper (Dettmers et al., 2022): columns with a larger activation stay out of the 8-bit product.
_OUTLIER_THRESHOLD = 6.0


def quantise(module: Any) -> None:
    """Replace every `torch.nn.Linear` below `module` by its 8-bit version, in place; the weights are quantised when moved to their device.

    Raises `NotReadyError` when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotReadyError("int8 needs bitsandbytes, which is not installed", "pip install 'inferctl[int8]'")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
            quantise(child)
