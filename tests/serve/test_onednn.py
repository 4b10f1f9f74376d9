"""The forward on CPUs: attention in buckets, linear layers packed for oneDNN, int8."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from inferctl.serve.engines import onednn, packed


def test_bucketed_attention_equals_attention_per_sequence() -> None:
    lengths = [33, 32, 32, 17, 16, 3, 1]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, sum(lengths), 8) for _ in range(3))
    module = torch.nn.Module()
    layouts = (
        packed.layout(lengths, torch.device("cpu"), varlen=False, bucketed=dtype) for dtype in (None, torch.float32)
    )
    alone, bucketed = (packed.attention(module, query, key, value, None, layout=layout)[0] for layout in layouts)
    torch.testing.assert_close(bucketed, alone)


def test_long_sequences_are_not_padded_to_buckets() -> None:
    assert packed.layout([513], torch.device("cpu"), varlen=False, bucketed=torch.float32).buckets is None


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("int8", "tolerance"), [(False, 0.02), (True, 0.04)])
def test_packed_linear_layers_equal_plain_ones(int8: bool, tolerance: float, gelu: bool) -> None:
    torch.manual_seed(0)
    block = torch.nn.Module()
    block.dense = torch.nn.Linear(64, 96).to(torch.bfloat16)
    block.intermediate_act_fn = ACT2FN["gelu"] if gelu else torch.nn.Identity()
    x = torch.randn(1, 50, 64, dtype=torch.bfloat16)
    x[0, 7] *= 50  # one token with large activations must not make the others inaccurate
    with torch.inference_mode():
        expected = block.intermediate_act_fn(block.dense(x)).float()
        onednn.pack(block, int8=int8)
        got = block.intermediate_act_fn(block.dense(x)).float()
    worst = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst.max() < tolerance
