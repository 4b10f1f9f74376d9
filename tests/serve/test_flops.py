"""The count of floating-point operations equals torch's counter on other lengths, for each architecture and head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core import document
from inferctl.estimate.cost import Transformer
from inferctl.facts import catalog
from inferctl.models.flops import ModelFlops
from inferctl.reading import task_config
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, MatrixRate, PrecisionInfo
from tests import engines, tiny_models
from tests.reading import saved_models
from tests.reading.test_saved_models import ARCHITECTURES, LAST, dense, normalized, pooled
from tests.tiny_models import CROSS_ENCODERS

TOKENS = 40


def ids(*lengths: int) -> list[Any]:
    return [np.arange(20, 20 + length, dtype=np.int32) for length in lengths]


def counted(model: Any, tokens: int = TOKENS) -> float:
    """Return what torch counts for one text, with products of matrices in place of a kernel for attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model.requires_grad_(False)
    given = torch.from_numpy(ids(tokens)[0].astype(np.int64))[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=given, attention_mask=torch.ones_like(given))
    return float(counter.get_total_flops())


def of_reference(folder: Path, task: Any) -> tuple[ModelFlops, Any]:
    """Return the count after two short texts, and the model of transformers."""
    from inferctl.serve.engines.plain import Reference

    reference = Reference(folder, task_config.read(task, folder))
    for each in ids(5, 9):
        if task == "rerank":
            reference.score([(each, 3)])
        else:
            reference.outputs(each, 0)
    assert reference.flops is not None
    return reference.flops, reference._model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_count_of_each_architecture_is_that_of_torch(tmp_path: Path, name: str) -> None:
    architecture, modules, settings = ARCHITECTURES[name]
    found, model = of_reference(saved_models.save(tmp_path, architecture, modules, {}, **settings), "embed")
    tokens = 14 if name == "longformer" else TOKENS  # its windows have 16 tokens, to which a text is padded
    assert found.flop(tokens) == pytest.approx(counted(model, tokens), rel=1e-6)


@pytest.mark.parametrize("architecture", CROSS_ENCODERS)
def test_the_count_of_a_reranker_has_its_head(tmp_path: Path, architecture: str) -> None:
    found, model = of_reference(tiny_models.make_cross_encoder(tmp_path, architecture), "rerank")
    assert found.flop(TOKENS) == pytest.approx(counted(model), rel=1e-6)


def test_the_count_of_a_sparse_encoder_has_the_logits_of_each_token(splade: Path) -> None:
    from inferctl.serve.engines.plain import Reference

    reference = Reference(splade, config := task_config.read("embed", splade))
    for each in ids(5, 9):
        reference.outputs(each, int(config.checked))  # type: ignore[union-attr]
    assert reference.flops is not None
    assert reference.flops.flop(TOKENS) == pytest.approx(counted(reference._model), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "qwen3", "gemma3_text"])
def test_the_count_is_that_of_estimates(tmp_path: Path, name: str) -> None:
    folder = saved_models.save(tmp_path, *ARCHITECTURES[name][:2], {})
    shape = Transformer.of(document.read(folder / "config.json", "").data)
    assert of_reference(folder, "embed")[0].flop(TOKENS) == pytest.approx(shape.flop(TOKENS), rel=1e-6)


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Any]:
    return lambda architecture, modules: engines.loaded(
        saved_models.save(tmp_path, architecture, modules, {}), max_batch_tokens=256
    )


def run(engine: Any, rows: list[Any]) -> float:
    return float(engine.run(engines.batch(rows)).flops)


def test_a_batch_counts_its_texts_and_their_layers_and_no_padding(engine: Any) -> None:
    loaded, info = engine("bert", lambda: [pooled("mean"), dense(32, 48), normalized()])
    assert info.flops.per_text == 2 * 32 * 48
    assert run(loaded, ids(3, 7, 50)) == pytest.approx(sum(map(info.flops.flop, (3, 7, 50))))
    assert info.matrix_rate.flops_per_s > 0
    assert info.matrix_rate.source == "measured"


def test_a_common_start_is_counted_once(engine: Any) -> None:
    loaded, info = engine("qwen3", LAST)
    texts = [np.append(ids(30)[0], np.int32(last)) for last in (60, 61, 62)]
    assert run(loaded, texts) == pytest.approx(3 * info.flops.flop(31) - 2 * info.flops.flop(30))
    assert run(loaded, ids(31)) == pytest.approx(info.flops.flop(31))


def test_a_model_that_pads_texts_to_chunks_never_counts_below_zero() -> None:
    from inferctl.serve.engines.flops import FlopCounter

    counter = FlopCounter()
    counter._linear, counter._others = {10: 1000.0, 20: 2000.0}, {10: 320.0, 20: 480.0}  # chunks of 8
    assert counter.model.flop(8192) == pytest.approx(8192 * (100 + 480 / 20))


@pytest.mark.parametrize(
    ("hardware", "precision", "tf32", "known"),
    [
        ("h100-sxm", "bf16", False, True),
        ("h100-sxm", "fp32", True, False),
        ("t4", "bf16", False, False),
        (None, "bf16", False, False),
    ],
)
def test_the_rate_of_a_gpu_is_its_peak_in_the_catalog(
    hardware: str | None, precision: str, tf32: bool, known: bool
) -> None:
    import torch

    from inferctl.serve.engines.flops import matrix_rate

    device = DeviceInfo("cuda", "a GPU", "9.0", 1 << 30, hardware=hardware)
    found = matrix_rate(device, PrecisionInfo("auto", precision, "native", "", tf32=tf32), torch.bfloat16, 1)
    peak = catalog.hardware(hardware).peaks[precision] if known and hardware else None
    assert found == (MatrixRate(peak * 1e12, "catalog") if peak else None)
