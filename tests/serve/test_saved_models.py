"""Model folders compute what sentence-transformers computes with them, from raw text, or they do not start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.serve import task_config
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig, Vectors
from inferctl.serve.tokenizer_pool import TokenizerPool
from tests.serve import saved_models
from tests.serve.saved_models import TEXTS, WIDTH, Modules


def pooled(*modes: str, **options: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(WIDTH, modes, **options)


def dense(inputs: int, outputs: int, activation: str = "Tanh", **options: Any) -> Any:
    import torch
    from sentence_transformers.base.modules import Dense

    return Dense(inputs, outputs, activation_function=getattr(torch.nn, activation)(), **options)


def layer_norm(size: int) -> Any:
    import torch
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    found = LayerNorm(size)
    torch.nn.init.normal_(found.norm.weight)
    torch.nn.init.normal_(found.norm.bias)
    return found


def normalized() -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


MEAN: Modules = lambda: [pooled("mean"), normalized()]  # noqa: E731
LAST: Modules = lambda: [pooled("lasttoken"), normalized()]  # noqa: E731

# Name: architecture, modules after the transformer, options of SentenceTransformer, settings of the architecture.
HEADS: dict[str, tuple[Modules, dict[str, Any]]] = {
    "cls": (lambda: [pooled("cls")], {}),
    "max": (lambda: [pooled("max")], {}),
    "mean": (lambda: [pooled("mean")], {}),
    "root of length": (lambda: [pooled("mean_sqrt_len_tokens")], {}),
    "weighted mean": (lambda: [pooled("weightedmean")], {}),
    "last": (lambda: [pooled("lasttoken")], {}),
    "cls + max": (lambda: [pooled("cls", "max")], {}),
    "mean + cls, not in the order of the flags": (lambda: [pooled("mean", "cls"), normalized()], {}),
    "all": (lambda: [pooled("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")], {}),
    "prompt excluded, without a prompt": (lambda: [pooled("mean", include_prompt=False)], {}),
    "Dense Tanh, as LaBSE": (lambda: [pooled("cls"), dense(WIDTH, WIDTH), normalized()], {}),
    "Dense Identity without bias, as sentence-t5": (
        lambda: [pooled("mean"), dense(WIDTH, 48, "Identity", bias=False), normalized()],
        {},
    ),
    "two Dense, as embeddinggemma": (
        lambda: [
            pooled("mean"),
            dense(WIDTH, 128, "Identity", bias=False),
            dense(128, WIDTH, "Identity", bias=False),
            normalized(),
        ],
        {},
    ),
    "Dense GELU": (lambda: [pooled("mean"), dense(WIDTH, 24, "GELU")], {}),
    "Dense ReLU": (lambda: [pooled("mean"), dense(WIDTH, 24, "ReLU")], {}),
    "Dense SiLU": (lambda: [pooled("mean"), dense(WIDTH, 24, "SiLU")], {}),
    "Dense with a residual": (lambda: [pooled("mean"), dense(WIDTH, WIDTH, use_residual=True)], {}),
    "Dense with a projected residual": (lambda: [pooled("mean"), dense(WIDTH, 12, use_residual=True)], {}),
    "LayerNorm": (lambda: [pooled("mean"), layer_norm(WIDTH)], {}),
    "three poolings, Dense, LayerNorm, Normalize": (
        lambda: [
            pooled("cls", "max", "mean"),
            dense(96, 16, "Identity", bias=False),
            layer_norm(16),
            normalized(),
        ],
        {"truncate_dim": 8},
    ),
    "Normalize before Dense": (lambda: [pooled("mean"), normalized(), dense(WIDTH, 16)], {}),
    "truncated": (MEAN, {"truncate_dim": 8}),
    "truncated to more than there is": (MEAN, {"truncate_dim": 99}),
}
ARCHITECTURES: dict[str, tuple[str, Modules, dict[str, Any]]] = {
    **{
        name: (name, MEAN, {})
        for name in (
            *("bert", "distilbert", "electra", "roberta", "xlm-roberta", "mpnet", "modernbert", "nomic_bert"),
            *("albert", "camembert", "deberta-v2", "eurobert", "gte"),
        )
    },
    **{name: (name, LAST, {}) for name in ("qwen3", "mistral", "gemma3_text", "gemma", "llama", "phi3", "qwen2")},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("bert", modules, options, settings)` returns the folder of a model."""
    return lambda architecture, modules=MEAN, options=None, **settings: saved_models.save(
        tmp_path_factory.mktemp(architecture), architecture, modules, options or {}, **settings
    )


def computed(folder: Path, precision: str = "fp32", texts: list[str] = TEXTS) -> tuple[Vectors, Any]:
    """Return what the engine computes for raw texts, and its info."""
    from inferctl.serve.engines.encoder import EncoderEngine

    config = EngineConfig(model=str(folder), precision=precision, device="cpu", max_batch_tokens=256)
    engine = EncoderEngine(config)
    info = engine.load()
    pool = TokenizerPool(folder, task_config.read("embed", folder), threads=1)
    rows = pool.encode_now(texts, truncate=True)
    pool.close()
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return engine.run(Batch(1, np.concatenate(rows), lengths)).vectors, info


def check(folder: Path, attention: str = "packed") -> None:
    """Raise unless the vectors of the folder equal those of sentence-transformers in fp32, and are close in bf16."""
    expected = saved_models.vectors(folder, TEXTS)
    found, info = computed(folder)
    assert found.shape == expected.shape
    assert info.attention == attention, info.attention_reason
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    reduced, info = computed(folder, "bf16")
    assert info.attention == attention, info.attention_reason
    norms = np.linalg.norm(reduced, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((reduced * expected).sum(axis=1) / norms).min() > 0.99


@pytest.mark.parametrize("name", HEADS)
def test_poolings_and_layers_equal_sentence_transformers(saved: Any, name: str) -> None:
    modules, options = HEADS[name]
    check(saved("bert", modules, options))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_sentence_transformers(saved: Any, name: str) -> None:
    architecture, modules, settings = ARCHITECTURES[name]
    attention = "padded" if architecture in ("mpnet", "deberta-v2") else "packed"
    check(saved(architecture, modules, None, **settings), attention)
