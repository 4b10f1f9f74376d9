"""The work of a model and the time of a batch."""

from __future__ import annotations

import pytest

from inferctl.errors import UsageError
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def test_bert_large_has_the_work_that_is_written_about_it() -> None:
    assert BERT_LARGE.per_token == pytest.approx(604e6, rel=1e-3)
    assert BERT_LARGE.per_token2 == 98304
    assert BERT_LARGE.flop(384) == pytest.approx(246.9e9, rel=0.01)  # 246.93 GOps in OpenVINO's model zoo


def test_work_follows_the_configuration() -> None:
    assert Transformer.of(MINILM).per_token == 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    distil = {"model_type": "distilbert", "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
    assert Transformer.of(distil).weights == 6 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_a_gate_is_a_third_matrix_and_few_key_heads_are_less_work() -> None:
    plain, gated = Transformer.of(MINILM), Transformer.of(MINILM | {"model_type": "modernbert"})
    assert gated.weights - plain.weights == 6 * 384 * 1536
    assert plain.weights - Transformer.of(MINILM | {"num_key_value_heads": 2}).weights == 6 * 2 * 384 * (384 - 64)


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="num_hidden_layers"):
        Transformer.of({"hidden_size": 384})


def test_a_batch_costs_its_fixed_time_and_its_work() -> None:
    cost = Cost(0.003, 1e-5, 1e-8)
    assert cost.batch([100, 200]) == pytest.approx(0.003 + 300e-5 + (10_000 + 40_000) * 1e-8)
    assert Cost.of(BERT_LARGE, 1e14, 0.0).sequence(128) == pytest.approx(BERT_LARGE.flop(128) / 1e14)
