"""Tests the FLOP of a model and the duration of a batch."""

from __future__ import annotations

import dataclasses

import pytest

from inferctl.core.errors import UsageError
from inferctl.estimate.calibration import FittedParameters, batch_cost
from inferctl.estimate.cost import BERT_LARGE, Cost, Kernel, Transformer
from inferctl.facts import catalog

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def test_bert_large_has_its_published_flop() -> None:
    assert BERT_LARGE.per_token == pytest.approx(604e6, rel=1e-3)
    assert BERT_LARGE.per_token2 == 98304
    assert BERT_LARGE.flop(384) == pytest.approx(246.9e9, rel=0.01)  # 246.93 GOps in OpenVINO's model zoo


def test_flop_depends_on_the_configuration() -> None:
    assert Transformer.of(MINILM).per_token == 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    distil = {"model_type": "distilbert", "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
    assert Transformer.of(distil).weights == 6 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_a_gate_is_a_third_matrix_and_fewer_key_heads_need_less_flop() -> None:
    plain, gated = Transformer.of(MINILM), Transformer.of(MINILM | {"model_type": "modernbert"})
    assert gated.weights - plain.weights == 6 * 384 * 1536
    assert plain.weights - Transformer.of(MINILM | {"num_key_value_heads": 2}).weights == 6 * 2 * 384 * (384 - 64)


def test_a_configuration_without_sizes_is_rejected() -> None:
    with pytest.raises(UsageError, match="num_hidden_layers"):
        Transformer.of({"hidden_size": 384})


def test_a_batch_takes_its_fixed_time_and_its_sequences() -> None:
    cost = Cost(0.003, 1e-5, 1e-8)
    assert cost.batch([100, 200]) == pytest.approx(0.003 + 300e-5 + (10_000 + 40_000) * 1e-8)
    assert Cost.of(BERT_LARGE, 1e14, 0.0).sequence(128) == pytest.approx(BERT_LARGE.flop(128) / 1e14)


def test_every_kernel_reads_its_inputs_and_writes_its_output_once() -> None:
    model = Transformer.of(MINILM)
    # Queries, keys, values; output projection; two residuals with normalization; two feed-forward products.
    per_layer = (384 + 3 * 384) + (384 + 384) + 2 * 3 * 384 + 2 * (384 + 1536)
    attention = 4 * 384
    assert model.values_per_token == 6 * (per_layer + attention)
    assert sum(kernel.flop for kernel in model.kernels) * 6 == model.per_token


@pytest.mark.parametrize(
    ("flops", "bytes_per_s", "seconds"), [(100.0, 10.0, 1 + 3), (1000.0, 10.0, 0.1 + 3), (100.0, None, 1.0)]
)
def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic(
    flops: float, bytes_per_s: float | None, seconds: float
) -> None:
    model = dataclasses.replace(BERT_LARGE, per_token=100.0, layers=1, kernels=(Kernel(100.0, 1), Kernel(0.0, 30)))
    assert Cost.of(model, flops, 0.0, *([bytes_per_s] if bytes_per_s else [])).per_token == pytest.approx(seconds)


def test_attention_of_short_sequences_is_bound_by_memory() -> None:
    cost = Cost(0.0, 0.0, per_token2=1e-9, attention=1e-7)
    assert cost.sequence(50) == pytest.approx(50 * 1e-7)
    assert cost.sequence(200) == pytest.approx(200 * 200 * 1e-9)
    assert cost.times(2).sequence(50) == pytest.approx(2 * cost.sequence(50))


def test_memory_traffic_slows_narrow_models_more_than_wide_ones() -> None:
    part, fit = catalog.hardware("t4"), FittedParameters(0.4, 0.002)

    def slowdown(model: Transformer) -> float:
        compute = Cost.of(model, 65e12 * 0.4, 0.0)
        return batch_cost(part, "fp16", fit, model).sequence(64) / compute.sequence(64)

    large, narrow = slowdown(BERT_LARGE) - 1, slowdown(Transformer.of(MINILM)) - 1
    assert 0.03 < large < 0.12
    assert narrow > 2 * large
