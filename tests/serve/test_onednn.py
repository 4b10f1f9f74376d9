"""Linear layers on CPUs: packed for oneDNN, int8, and without the private operators of torch that they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import NotReadyError
from tests.engines import batch, loaded
from tests.serve.test_encoder import plain, sequences


@pytest.fixture(autouse=True)
def _bf16(request: pytest.FixtureRequest) -> None:
    """Skip the test if it has the parameter bf16 and oneDNN has no bf16 on this CPU."""
    import torch

    parameters = getattr(request.node, "callspec", None)
    if parameters and "bf16" in parameters.params.values() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this CPU")


def make_block(gelu: bool, dtype: Any) -> Any:
    """Return a linear layer and its activation, as in an encoder."""
    import torch
    from transformers.activations import ACT2FN

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.dtype = dtype
            self.dense = torch.nn.Linear(64, 96, dtype=dtype)
            self.intermediate_act_fn = ACT2FN["gelu"] if gelu else torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.intermediate_act_fn(self.dense(x)).float()

    return Block()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("precision", "int8", "tolerance"),
    [("fp32", False, 1e-5), ("fp32", True, 0.04), ("bf16", False, 0.02), ("bf16", True, 0.04)],
)
def test_packed_linear_layers_equal_plain_ones(precision: str, int8: bool, tolerance: float, gelu: bool) -> None:
    import torch

    from inferctl.serve.engines import onednn

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    block = make_block(gelu, dtype)
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
    import torch

    from inferctl.serve.engines import onednn

    if levels is not None:
        monkeypatch.setattr(onednn, "_weight_levels", lambda: levels)
    linear = torch.nn.Linear(64, 64)
    with torch.inference_mode():
        linear.weight.fill_(1.0)
        linear.bias.zero_()
        x = torch.linspace(0.5, 1.0, 64).repeat(16, 1)
        got, expected = onednn.Int8Linear(linear)(x), linear(x)
    assert torch.allclose(got, expected, rtol=0.01)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_without_the_private_operators_bf16_uses_plain_layers_and_int8_does_not_start(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    import torch

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
    folder = tiny("bert", "mean_tokens")
    if precision == "int8":
        with pytest.raises(NotReadyError, match=f"oneDNN operators of torch {torch.__version__}".replace("+", r"\+")):
            loaded(folder, precision)
        return
    engine, info = loaded(folder, precision)
    assert [f"oneDNN operators of torch {torch.__version__}" in warning for warning in info.warnings] == [True]
    rows = sequences()
    got = engine.run(batch(rows)).rows
    assert float(np.min((got * plain(folder, rows)).sum(axis=1))) > 0.99
    assert info.attention == "packed"
