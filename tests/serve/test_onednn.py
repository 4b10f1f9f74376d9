"""Linear layers on CPUs: packed for oneDNN, int8, and without the private operators of torch that they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from inferctl.errors import NotReadyError
from inferctl.serve.engine_process.engine_protocol import EngineConfig
from inferctl.serve.engines import onednn
from inferctl.serve.engines.encoder import EncoderEngine
from tests.serve.test_encoder import batch, plain, sequences

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="oneDNN has no bf16 on this CPU")


class Block(torch.nn.Module):
    def __init__(self, gelu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.dense = torch.nn.Linear(64, 96, dtype=dtype)
        self.intermediate_act_fn = ACT2FN["gelu"] if gelu else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(x)).float()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "int8", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        (torch.float32, True, 0.04),
        pytest.param(torch.bfloat16, False, 0.02, marks=needs_bf16),
        pytest.param(torch.bfloat16, True, 0.04, marks=needs_bf16),
    ],
)
def test_packed_linear_layers_equal_plain_ones(dtype: torch.dtype, int8: bool, tolerance: float, gelu: bool) -> None:
    block = Block(gelu, dtype)
    x = torch.randn(1, 50, 64, dtype=dtype)
    x[0, 7] *= 50  # one token with large activations must not make the others inaccurate
    given = x.clone()
    with torch.inference_mode():
        expected = block(x)
        assert onednn.pack(block, int8=int8) is None
        got = block(x)
    assert torch.equal(x, given)  # the residual connection adds it later
    assert isinstance(block.dense, onednn.Int8Linear if int8 else onednn.Linear)
    worst = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst.max() < tolerance


@pytest.mark.parametrize("levels", [None, 63])
def test_large_products_of_int8_do_not_overflow(levels: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI, two products of 8 bits do not fit into the 16 bits of their sum. None: as on this CPU."""
    if levels is not None:
        monkeypatch.setattr(onednn, "_weight_levels", lambda: levels)
    linear = torch.nn.Linear(64, 64)
    with torch.inference_mode():
        linear.weight.fill_(1.0)
        linear.bias.zero_()
        x = torch.linspace(0.5, 1.0, 64).repeat(16, 1)
        got, expected = onednn.Int8Linear(linear)(x), linear(x)
    assert torch.allclose(got, expected, rtol=0.01)


def test_public_operators_quantize_like_the_deprecated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-127, 127, 4096).view(8, 512)
    expected = onednn._quantized(x.clone())
    monkeypatch.delattr(torch, "quantize_per_tensor")
    assert torch.equal(onednn._quantized(x.clone()), expected)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), "int8"])
@pytest.mark.parametrize("failure", ["missing", "changed"])
def test_without_the_private_operators_bf16_uses_plain_layers_and_int8_does_not_start(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, precision: str, failure: str
) -> None:
    def changed(*_: Any) -> None:
        raise TypeError("unexpected number of arguments")

    namespace, names = (
        (torch.ops.mkldnn, ["_linear_pointwise", "_reorder_linear_weight"])
        if precision == "bf16"
        else (torch.ops.onednn, ["qlinear_pointwise", "qlinear_prepack"])
    )
    for name in names:
        getattr(namespace, name)  # torch caches it as an attribute of the namespace
        monkeypatch.setattr(namespace, name, changed)
    if failure == "missing":
        monkeypatch.setattr(torch.ops, namespace.name, torch._ops._OpNamespace("no_such_namespace"))
    folder = tiny("bert", "mean_tokens")
    engine = EncoderEngine(EngineConfig(model=str(folder), precision=precision, device="cpu"))
    if precision == "int8":
        with pytest.raises(NotReadyError, match=f"oneDNN operators of torch {torch.__version__}".replace("+", r"\+")):
            engine.load()
        return
    info = engine.load()
    assert [f"oneDNN operators of torch {torch.__version__}" in warning for warning in info.warnings] == [True]
    rows = sequences()
    got = engine.run(batch(rows)).vectors
    assert float(np.min((got * plain(folder, rows)).sum(axis=1))) > 0.99
    assert info.attention == "packed"
