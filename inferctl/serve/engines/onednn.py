"""Linear layers for CPUs on oneDNN, which torch brings: weights packed once for its kernels, GELU fused into the product, 8-bit or as they are.

8-bit: a scale for each output channel of the weights and for each token of the activations, taken from what comes in; products in int32, answers
in the format around. Nothing is calibrated, so no text can leave the range. One scale for all tokens would cost less, but a few tokens have
very large activations: it took all-MiniLM-L6-v2's lowest cosine to fp32 from 0.996 to 0.985, and made a text's vector depend on its neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

# oneDNN makes code for every number of rows that it meets, and keeps it: half a MiB each, beyond the reach of its own cache's limit. A row of 1,024
# tokens at most would come to a GiB within minutes. Rows are filled up to few numbers instead: multiples of an eighth of the power of two below.
_FINEST = 16
# The batch that oneDNN packs weights for; others run as well.
_PACKED_FOR = 512
_TINY = 1e-12
_ZERO = 128  # the level of zero: the kernel is fast for unsigned activations only
_GELU: tuple[Any, ...] = ("gelu", [], "none")
_PLAIN: tuple[Any, ...] = ("none", [], "")
# torch's own operators of this kind are to move to torchao; the one used here has no successor yet.
warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")


def filled(rows: int) -> int:
    """To how many rows `rows` should be filled up: an eighth more at most, from 128 on."""
    step = max(_FINEST, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def _with_filling(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`compute` on x [..., in], filled up where the caller did not do so already."""
    rows = x.numel() // x.shape[-1]
    if (whole := filled(rows)) == rows:
        return compute(x)
    flat = torch.nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, whole - rows))
    return compute(flat)[:rows].view(*x.shape[:-1], -1)


class Linear(torch.nn.Module):
    """What `torch.nn.Linear` computes, bf16 or fp32, with GELU behind it when `gelu`."""

    def __init__(self, linear: torch.nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_FOR)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._after = _GELU if gelu else _PLAIN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return _with_filling(self._compute, x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._after)
        return out


class Int8Linear(torch.nn.Module):
    """The same with 8-bit weights and activations."""

    def __init__(self, linear: torch.nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self._scales = weight.abs().amax(dim=1).clamp(min=_TINY) / 127
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, [_PACKED_FOR, weight.shape[1]])
        self._bias = linear.weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        self._gelu = gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the format of `x`."""
        return _with_filling(self._compute, x)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=_TINY) / 127
        levels = torch.quantize_per_tensor(x.float().mul_(scales.reciprocal()), 1.0, _ZERO, torch.quint8)
        # int_repr() would copy what is only to be looked at as bytes.
        raw = torch.empty(0, dtype=torch.uint8).set_(levels.untyped_storage(), 0, levels.shape, levels.stride())
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            raw, 1.0, _ZERO, self._weight, self._scales, self._zeros, None, 1.0, 0, x.dtype, *_PLAIN
        )
        torch.addcmul(self._bias, out, scales.to(x.dtype), out=out)
        return torch.ops.aten.gelu_(out) if self._gelu else out


def pack(model: Any, *, int8: bool) -> None:
    """Replace the linear layers of `model`, in place."""
    for module in list(model.modules()):
        # Where BERT and its kin keep the activation of their feed-forward block.
        fused = type(getattr(module, "intermediate_act_fn", None)).__name__ == "GELUActivation"
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                gelu = fused and name == "dense"
                setattr(module, name, Int8Linear(child, gelu=gelu) if int8 else Linear(child, gelu=gelu))
                if gelu:
                    module.intermediate_act_fn = torch.nn.Identity()
