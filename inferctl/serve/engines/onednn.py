"""Linear layers for CPUs on oneDNN, a part of torch: weights packed once for its kernels, optional GELU, optional int8.

int8 uses one scale per output channel of the weights and one per token of the activations, computed from the input.
Products are in int32, results in the format of the input. There is no calibration, so no text exceeds a calibrated
range. One scale for all tokens would take less time, but a few tokens have very large activations. It lowered the
minimum cosine to fp32 of all-MiniLM-L6-v2 from 0.996 to 0.985, and a vector then depended on the other texts of its
batch. Calibrated on eight texts, it lowered the cosine to 0.983, and was hardly faster than bf16 with AMX.

CPUs without VNNI or AMX add two products in 16 bits, which overflow. There, the weights have 7 bits, so that two
products of at most 255 x 63 fit. With 7 bits for the activations instead, the minimum cosine was 0.966 and not 0.983.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from inferctl.core.errors import NotReadyError
from inferctl.serve.engine_process import failures

# oneDNN generates code for each number of rows and keeps it: 0.5 MiB each, which the limit of its cache does not count.
# Batches of up to 1,024 tokens would reach 1 GiB within minutes. So rows are padded to few sizes: multiples of an
# eighth of the next lower power of two.
_MIN_STEP = 16
# The number of rows that oneDNN packs weights for. Others run too.
_PACKED_ROWS = 512
_TINY = 1e-12
_LEVELS, _LEVELS_7_BITS = 127, 63
_ZERO_POINT = 128  # the kernel is fast only for unsigned activations
_NO_ACTIVATION: tuple[Any, ...] = ("none", [], "")
# The warning says that this operator moves to torchao. It has no replacement yet.
warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")


def round_up_rows(rows: int) -> int:
    """Return to how many rows `rows` are padded: at most an eighth more, for 128 rows or more."""
    step = max(_MIN_STEP, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class Linear(torch.nn.Module):
    """Computes what `torch.nn.Linear` computes, in bf16 or fp32, followed by GELU if `gelu`."""

    def __init__(self, linear: torch.nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self._gelu = gelu
        self.weight = None  # T5 converts its input to the format of this, if it is a tensor
        self._bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self._pack_weight(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product in the format of `x`: [..., in] -> [..., out]."""
        rows = x.numel() // x.shape[-1]
        if (size := round_up_rows(rows)) == rows:
            return self._compute(x)
        flat = torch.nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, size - rows))
        return self._compute(flat)[:rows].view(*x.shape[:-1], -1)

    def _pack_weight(self, weight: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        activation: tuple[Any, ...] = ("gelu", [], "none") if self._gelu else _NO_ACTIVATION
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *activation)
        return out


class Int8Linear(Linear):
    """Computes what `Linear` computes, with 8-bit weights and activations."""

    def _pack_weight(self, weight: torch.Tensor) -> None:
        self._scales = weight.abs().amax(dim=1).float().clamp(min=_TINY) / _weight_levels()
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight.float() / self._scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, [_PACKED_ROWS, weight.shape[1]])

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=_TINY) / _LEVELS
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(_quantized(x * scales.reciprocal()), 1.0, _ZERO_POINT),
            *(self._weight, self._scales, self._zeros, None, 1.0, 0, x.dtype, *_NO_ACTIVATION),
        )
        torch.addcmul(self._bias, out, scales.to(x.dtype), out=out)
        return torch.ops.aten.gelu_(out) if self._gelu else out


@functools.cache
def _weight_levels() -> int:
    """Return the largest level of weights for which the products of this CPU are exact."""
    size = 64
    weight = torch.ops.onednn.qlinear_prepack(torch.full((size, size), _LEVELS, dtype=torch.int8), [size, size])
    out = torch.ops.onednn.qlinear_pointwise(
        *(torch.full((size, size), 255, dtype=torch.uint8), 1.0, _ZERO_POINT, weight),
        *(torch.ones(size), torch.zeros(size, dtype=torch.int64), None, 1.0, 0, torch.float32, *_NO_ACTIVATION),
    )
    return _LEVELS if bool((out == size * (255 - _ZERO_POINT) * _LEVELS).all()) else _LEVELS_7_BITS


def _quantized(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, which it overwrites, rounded and shifted by the zero point, as uint8."""
    levels = torch.quantize_per_tensor(x, 1.0, _ZERO_POINT, torch.quint8)
    # A view of the bytes; `int_repr()` would copy them.
    return torch.empty(0, dtype=torch.uint8).set_(levels.untyped_storage(), 0, levels.shape, levels.stride())


def pack(model: Any, *, int8: bool) -> str | None:
    """Replace the linear layers of `model`, in place. Return a warning if torch does not have the operators for that.

    These operators are private to torch, so a release can change them. Raises `NotReadyError` for int8, which has no
    other implementation.
    """
    layer = Int8Linear if int8 else Linear
    try:
        sample = torch.nn.Linear(32, 32, dtype=model.dtype)
        with torch.inference_mode():
            layer(sample)(torch.zeros(1, 32, dtype=model.dtype))
    except Exception as error:  # depends on what the release changed
        reason = f"the oneDNN operators of torch {torch.__version__} cannot be used: {failures.summary(error)}"
        if int8:
            raise NotReadyError(
                f"int8 is not available: {reason}", "use `--precision auto`, or another torch"
            ) from error
        return f"{reason}. The plain layers of torch are slower"
    for module in list(model.modules()):
        # BERT-like models have the activation of their feed-forward block here.
        fused = type(getattr(module, "intermediate_act_fn", None)).__name__ == "GELUActivation"
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                gelu = fused and name == "dense"
                setattr(module, name, layer(child, gelu=gelu))
                if gelu:
                    module.intermediate_act_fn = torch.nn.Identity()
    return None
