"""Norms and rotary embeddings of decoders in few passes over memory. transformers computes each as many operations.

What is replaced is found by what it computes, and not by its name: the code of the model and the replacement get the
same random numbers. So an architecture of which this module knows nothing gains too, and one that differs keeps its
own code. The reference in `plain.py` is never fused.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch


class RMSNorm(torch.nn.Module):
    """Root mean square normalization, as `torch.nn.RMSNorm` defines it, in one kernel on GPUs.

    If the weights have another format than the input, it is computed in that of the weights.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self._eps = torch.nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` divided by its root mean square, times the weight: [..., size]."""
        out: torch.Tensor
        if not _composes(x.device):
            wide = x.to(self.weight.dtype)
            out = torch.nn.functional.rms_norm(wide, self.weight.shape, self.weight, self._eps)
            return out.to(x.dtype)
        # For 1,024 tokens, `rms_norm` takes two to four times as long there.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = norm.square_().div_(x.shape[-1]).add_(self._eps).rsqrt_()
        out = (x.float() * factor).mul_(self.weight).to(x.dtype)
        return out


def _composes(device: torch.device) -> bool:
    """Return whether torch composes `rms_norm` there of other operations."""
    return device.type == "cpu"


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys with rotary embeddings, in three passes each: [..., tokens, size].

    The first half of the numbers is paired with the second: `apply_rotary_pos_emb` of transformers has this signature.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    # Some models keep the cosines in fp32.
    return _rotated(q, cos, sin).to(q.dtype), _rotated(k, cos, sin).to(k.dtype)


def rotate_in_fp32(q: torch.Tensor, k: torch.Tensor, *others: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rotate` returns, rounded once."""
    a, b = rotate(q.float(), k.float(), *others, **options)
    return a.to(q.dtype), b.to(k.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@torch.inference_mode()
def apply(model: Any) -> None:
    """Replace what can be fused in the modules of `model`, in place, before it is moved to its device."""
    norms: dict[tuple[Any, ...], tuple[float, float] | None] = {}
    rotations: dict[Callable[..., Any], Callable[..., Any] | None] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if [each for each, _ in child.named_parameters()] != ["weight"] or child.weight.dim() != 1:
                continue
            numbers = tuple(value for value in vars(child).values() if isinstance(value, float))
            flags = tuple(value for value in vars(child).values() if isinstance(value, int | str))
            key = type(child), child.weight.shape, numbers, flags
            if key not in norms:
                norms[key] = _as_norm(child, numbers)
            if (found := norms[key]) is not None:
                setattr(module, name, RMSNorm(_raised(child.weight.detach(), found[0]), found[1]))
        forward = inspect.unwrap(type(module).forward)
        known = forward.__globals__.get(rotate_name := "apply_rotary_pos_emb")
        if known is not None and rotate_name in forward.__code__.co_names:
            if known not in rotations:
                rotations[known] = _as_rotation(known)
            if (rotation := rotations[known]) is not None:
                module.forward = types.MethodType(_with(forward, {rotate_name: rotation}), module)


def _as_norm(module: torch.nn.Module, numbers: tuple[float, ...]) -> tuple[float, float] | None:
    """Return what to add to the weights, and eps, for `RMSNorm` to compute what `module` does; None if it cannot."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return None  # the norms of Mamba 2 take a gate, too, and are plain norms without one
    probe: Any = copy.deepcopy(module).float()
    random = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=random))
    x = torch.randn(4, *probe.weight.shape, generator=random) * torch.tensor([[1.0], [30.0], [1e-2], [1e-3]])
    try:
        expected = probe(x)
        for offset, eps in ((offset, eps) for offset in (0.0, 1.0) for eps in numbers):
            if _close(RMSNorm(_raised(probe.weight, offset), eps)(x), expected):
                return offset, eps
    except Exception:  # noqa: BLE001  # a module that takes other inputs can fail in any way
        return None
    return None


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _raised(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the sum, in fp32: Gemma adds 1 to its weights, next to which bf16 has no room for them."""
    return weight.float() + offset if offset else weight


def _as_rotation(known: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function of this module that computes what `known` does, else None."""
    random = torch.Generator().manual_seed(0)
    # bf16 has all of these numbers.
    q, k, cos, sin = (
        torch.randn(*shape, 3, 8, generator=random).bfloat16().float() for shape in ((1, 4), (1, 2), (1,), (1,))
    )
    try:
        expected = known(q, k, cos, sin, unsqueeze_dim=1)
        if not all(_close(*pair) for pair in zip(expected, rotate(q, k, cos, sin), strict=True)):
            return None
        rounded = known(*(values.bfloat16() for values in (q, k, cos, sin)))
        in_fp32 = all(torch.equal(a, b.bfloat16()) for a, b in zip(rounded, expected, strict=True))
    except Exception:  # noqa: BLE001  # another function of this name can fail in any way
        return None
    try:
        known(q, k, cos[..., :4], sin[..., :4])
    except RuntimeError:
        return rotate_in_fp32 if in_fp32 else rotate
    return None  # it rotates a part of the numbers in some models


def _with(function: Any, replaced: dict[str, Any]) -> Any:
    """Return a copy of a function for which some global names mean something else."""
    scope = function.__globals__ | replaced
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
