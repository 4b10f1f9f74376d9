"""Fused modules: equal to those of transformers, and how many operations a GPU launches for a layer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "engine"))

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1000, "pad_token_id": 0, "layer_norm_eps": 1e-5}


# Norms and attention modules that are replaced. GPT-NeoX and Phi 3 rotate a part of the numbers, GLM other pairs.
@pytest.mark.parametrize(
    ("architecture", "norms", "rotations"),
    [
        ("bert", 0, 0),
        ("modernbert", 0, 2),
        ("nomic_bert", 0, 2),
        ("eurobert", 5, 2),
        ("qwen2", 5, 2),
        ("qwen3", 9, 2),
        ("llama", 5, 2),
        ("mistral", 5, 2),
        ("gemma", 5, 2),
        ("gemma2", 9, 2),
        ("gemma3_text", 13, 2),
        ("olmo2", 9, 2),
        ("phi3", 5, 0),
        ("glm", 5, 0),
        ("gpt_neox", 0, 0),
        ("t5", 5, 0),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_fused_modules_compute_what_those_of_transformers_compute(
    architecture: str, norms: int, rotations: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gpu`: with the operations of GPUs, on a CPU."""
    import torch
    from transformers import AutoConfig, AutoModel

    from inferctl.serve.engines import fused

    torch.manual_seed(0)
    model: Any = AutoModel.from_config(AutoConfig.for_model(architecture, **SIZES)).eval()
    model = model.encoder if architecture == "t5" else model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    monkeypatch.setattr(fused, "_composes", lambda _: not gpu)
    tokens = torch.randint(5, 1000, (2, 40))
    least = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        replaced = copy.deepcopy(model)
        fused.apply(replaced)
        found = [isinstance(module, fused.RMSNorm) for module in replaced.modules()]
        assert (sum(found), sum("forward" in vars(module) for module in replaced.modules())) == (norms, rotations)
        with torch.inference_mode():
            states = [each(input_ids=tokens).last_hidden_state.float() for each in (model, replaced)]
        if dtype == torch.float32:
            expected = states[0]
            assert torch.allclose(states[1], expected, rtol=1e-4, atol=1e-5)
        least += [1 - torch.cosine_similarity(each, expected, dim=-1).mean() for each in states]
    assert least[3] <= 1.1 * least[2]  # in bf16: not further from fp32 than transformers


def test_norms_that_take_more_than_states_are_not_replaced() -> None:
    import torch
    from transformers import AutoModel, Mamba2Config

    from inferctl.serve.engines import fused

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 100}
    config = Mamba2Config(**sizes, head_dim=8, num_heads=8, n_groups=1, chunk_size=8)
    model: Any = AutoModel.from_config(config).eval()
    replaced = copy.deepcopy(model)
    fused.apply(replaced)
    assert sum(isinstance(module, fused.RMSNorm) for module in replaced.modules()) == 3
    with torch.inference_mode():
        expected, found = (each(input_ids=torch.arange(5, 20)[None]).last_hidden_state for each in (model, replaced))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "per_layer"),
    [
        # Products 6, attention 1, norms 2, residuals 2, GELU 1.
        ("bert", 12),
        # Products 7, attention 1, norms 4, rotation 6, residuals 2, SwiGLU 2.
        ("qwen3", 22),
    ],
)
def test_a_layer_takes_few_launches_on_a_gpu(tiny: Any, architecture: str, per_layer: int) -> None:
    from tests.serve import launches

    counts = []
    for layers in (2, 3):
        forward = launches.load(tiny(architecture, "mean_tokens"))
        kept = getattr(forward._encoder, "layers", None) or forward._encoder.encoder.layer
        del kept[layers:]
        forward._model.config.num_hidden_layers = layers
        traced = launches.trace(forward, 3, 20)
        counts.append(sum(traced.launches.values()))
    assert counts[1] - counts[0] == per_layer, traced.launches
    assert (traced.syncs, traced.to_host) == (1, 3 * 32 * 4)
