"""Packed and padded forwards equal the reference, for the real model and small random ones of other architectures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import NotReadyError, UsageError
from inferctl.facts import precision
from inferctl.reading import embedding_config, rerank_config
from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, EngineConfig
from inferctl.serve.observe import describe
from tests import tiny_models
from tests.engines import batch


def sequences(count: int = 12, longest: int = 120) -> list[Tokens]:
    rng = np.random.default_rng(3)
    lengths = [1, 2, 2, longest, *rng.integers(3, longest, count - 4).tolist()]
    return [rng.integers(1000, 30000, n).astype(np.int32) for n in lengths]


def plain(folder: Path, rows: list[Tokens]) -> Vectors:
    from inferctl.serve.engines import plain

    return plain.Reference(folder, embedding_config.read(folder)).embed(rows)


def encoder_engine(config: EngineConfig) -> Any:
    from inferctl.serve.engines.encoder import EncoderEngine  # it imports torch, which only one test worker does

    return EncoderEngine(config)


def test_a_broken_packed_path_is_detected_and_not_used(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines import packed

    layout = packed.layout

    def leaking(lengths: list[int], *arguments: Any, **_: Any) -> Any:
        return layout([sum(lengths)], *arguments)

    monkeypatch.setattr(packed, "layout", leaking)
    folder = tiny("bert", "mean_tokens")
    engine = encoder_engine(EngineConfig(model=str(folder), precision="fp32", device="cpu"))
    info = engine.load()
    assert info.attention == "padded"
    assert "differs from padded" in info.attention_reason
    rows = sequences()
    np.testing.assert_allclose(engine.run(batch(rows)).rows, plain(folder, rows), rtol=1e-4, atol=1e-5)


def test_the_comparison_with_fp32_is_of_the_attention_that_serves(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines.forward import Forward
    from inferctl.serve.engines.prepared import Sequences

    pack, call, rejected = Forward.pack, Forward.__call__, []

    def rejecting(forward: Forward, on: bool = True) -> None:
        if on:
            rejected.append(forward)
            raise RuntimeError("no packing")
        pack(forward, on)

    def damaged(forward: Forward, texts: Sequences) -> Vectors:
        vectors = call(forward, texts)
        return vectors[:, ::-1] if forward in rejected else vectors

    monkeypatch.setattr(Forward, "pack", rejecting)
    monkeypatch.setattr(Forward, "__call__", damaged)
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", device="cpu", allow_inaccurate=True)
    with pytest.raises(UsageError, match=r"fp32 is inaccurate: cosine to fp32 -?0\.[0-8]"):
        encoder_engine(config).load()


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("bf16", 0.999), ("fp16", 0.9999), ("int8", 0.98)])
def test_every_precision_stays_close_to_fp32_on_the_real_model(minilm: Path, precision: str, least: float) -> None:
    # Small batches: emulated formats need seconds for the largest batch, which the engine runs first.
    engine = encoder_engine(EngineConfig(model=str(minilm), precision=precision, device="cpu", max_batch_tokens=256))
    info = engine.load()
    rows = sequences(8, 200)
    cosines = (engine.run(batch(rows)).rows * plain(minilm, rows)).sum(axis=1)
    assert cosines.min() >= least
    assert info.cosine_min is not None
    assert info.cosine_min >= least
    assert info.attention == "packed"
    assert (info.precision.requested, info.precision.effective) == (precision, precision)


def test_an_emulated_format_is_reported_as_emulated() -> None:
    from inferctl.serve.engines import device

    old_cpu = precision.DeviceTraits("cpu", cpu_flags=frozenset({"avx2"}))
    t4 = precision.DeviceTraits("cuda", compute_capability=(7, 5))
    assert device.choose("bf16", t4)[0].level == "emulated"
    assert device.choose("auto", t4)[0].effective == "fp16"
    assert device.choose("auto", old_cpu)[0].effective == "fp32"
    assert device.choose("auto", precision.DeviceTraits("cuda", compute_capability=(8, 0)))[0].effective == "bf16"
    with pytest.raises(NotReadyError, match=r"int8 is not supported on this device"):
        device.choose("int8", precision.DeviceTraits("cuda", compute_capability=(7, 0)))


def test_rows_with_nan_are_marked(tiny: Any) -> None:
    import torch

    engine = encoder_engine(EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", device="cpu"))
    engine.load()
    with torch.no_grad():
        engine._compute._forward._model.embeddings.word_embeddings.weight[777] = float("nan")
    rows = [np.array(ids, dtype=np.int32) for ids in ([5, 6], [5, 777, 6], [7])]
    assert engine.run(batch(rows)).ok.tolist() == [True, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
@pytest.mark.usefixtures("gpu")
def test_variable_length_attention_on_a_gpu_equals_padding(tiny: Any, architecture: str) -> None:
    folder = tiny(architecture, "mean_tokens")
    engine = encoder_engine(EngineConfig(model=str(folder), precision="auto", device="cuda"))
    info = engine.load()
    assert (info.device.kind, info.attention) == ("cuda", "packed"), info.attention_reason
    rows = sequences()
    assert (engine.run(batch(rows)).rows * plain(folder, rows)).sum(axis=1).min() > 0.98


@pytest.mark.parametrize("size", [1, 16, 17, 128, 129, 1000, 1024, 5000])
def test_rows_are_padded_to_few_sizes_with_little_padding(size: int) -> None:
    from inferctl.serve.engines.onednn import round_up_rows

    assert size <= round_up_rows(size) <= max(size + 15, size * 9 / 8 + 1)
    assert round_up_rows(round_up_rows(size)) == round_up_rows(size)
    assert len({round_up_rows(rows) for rows in range(1, 2049)}) <= 8 * 5


def test_an_engine_with_previous_info_skips_the_checks_and_computes_the_same(minilm: Path) -> None:
    config = EngineConfig(model=str(minilm), precision="auto", device="cpu")
    first = encoder_engine(config)
    found = first.load()
    again = encoder_engine(replace(config, previous_info=found.to_json()))
    again._choose_settings = None  # fails if called
    assert again.load() == found
    both = batch([np.arange(1000, 1060, dtype=np.int32), np.arange(1060, 1100, dtype=np.int32)])
    assert np.allclose(again.run(both).rows, first.run(both).rows, atol=1e-3)


def started(engine: Any) -> tuple[Any, list[str]]:
    """Load an engine, and return its info and the lines printed at the start."""
    info = engine.load()
    return info, list(describe.lines(info))


def altered(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Edit the weights of the model in `folder` with `change`, and return the folder."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (7, 5)) -> None:
    """Make the engine detect a GPU, with its tensors on the CPU."""
    import torch

    from inferctl.serve.engines import device

    info = DeviceInfo("cuda", "stand-in", "{}.{}".format(*capability), 16 << 30)
    traits = precision.DeviceTraits("cuda", compute_capability=capability)
    monkeypatch.setattr(device, "detect", lambda _: (torch.device("cpu"), info, traits))


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, message: str = OUT_OF_MEMORY) -> None:
    """Let batches of more than `most` tokens run out of memory, with this message of torch."""
    import torch

    from inferctl.serve.engines.forward import Forward

    forward = Forward.__call__

    def limited(self: Forward, rows: Any) -> Vectors:
        if sum(rows.lengths) > most:
            raise torch.OutOfMemoryError(message) if message == OUT_OF_MEMORY else RuntimeError(message)
        return forward(self, rows)

    monkeypatch.setattr(Forward, "__call__", limited)


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_the_batch_limit_is_lowered_until_memory_is_sufficient(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    with_gpu(monkeypatch)
    short_of_memory(monkeypatch, 1500)
    config = EngineConfig(model=str(tiny(architecture, "mean_tokens")), precision="fp32", max_batch_tokens=4096)
    info, lines = started(encoder_engine(config))
    assert info.batch_tokens == 1024
    # A torch for CUDA warns that this machine has no driver.
    assert [line for line in lines if line.startswith("warning") and "no usable GPU" not in line] == [
        "warning    insufficient memory for batches of 4096 tokens: the limit is 1024 (serve.max_batch_tokens)"
    ]
    short_of_memory(monkeypatch, 300)
    again = encoder_engine(replace(config, previous_info=info.to_json()))
    info = again.load()
    assert info.batch_tokens == 256
    assert [warning for warning in info.warnings if "no usable GPU" not in warning] == [
        "insufficient memory for batches of 1024 tokens: the limit is 256 (serve.max_batch_tokens)"
    ]
    assert again._compute.batch_tokens == 256  # also for padded sub-batches


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_check_texts_run_in_smaller_batches_if_memory_is_insufficient(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    with_gpu(monkeypatch, capability)
    short_of_memory(monkeypatch, 300)
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", max_batch_tokens=1024)
    info = encoder_engine(config).load()
    assert (info.batch_tokens, info.within_limit) == (256, True)
    assert any("the limit is 256" in warning for warning in info.warnings)


@pytest.mark.parametrize(
    ("most", "error", "hint"),
    [(50, r"for one input of \d+ tokens", "max_input_tokens"), (60, "for a batch of 64 tokens", "max_batch_tokens")],
)
def test_insufficient_memory_for_one_input_or_any_batch_names_the_setting(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, most: int, error: str, hint: str
) -> None:
    with_gpu(monkeypatch)
    short_of_memory(monkeypatch, most)
    limit = 32 if most == 60 else None  # then all check texts fit, but not the smallest batch
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", max_input_tokens=limit)
    with pytest.raises(NotReadyError, match=f"insufficient memory {error}") as caught:
        encoder_engine(config).load()
    assert f"serve.{hint}" in (caught.value.hint or "")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("error", ["AcceleratorError", "OutOfMemoryError"])
def test_insufficient_memory_for_the_weights_is_not_reported_as_an_attention_problem(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], error: str
) -> None:
    import torch

    moves = []

    def to(*_: Any, **__: Any) -> None:
        moves.append(1)
        raise getattr(torch, error)("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    with_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(
        NotReadyError, match=r"insufficient memory to load the model: CUDA error: out of memory$"
    ) as caught:
        encoder_engine(EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp16")).load()
    assert "nvidia-smi" in (caught.value.hint or "")
    assert len(moves) == 1


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("auto", 4),
        ("cuda", 4),
        ("cuda:1", 1),
        ("cuda:9", "GPU cuda:9 not found"),
        *((device, "unknown device") for device in ("gpu", "cuda:", "cuda:x", "cuda0", "")),  # and not the CPU
    ],
)
def test_auto_and_cuda_use_all_gpus_and_what_is_no_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch, device: str, found: int | str
) -> None:
    import torch

    from inferctl.serve.engines import device as devices

    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    if isinstance(found, int):
        assert devices.detect(device)[1].count == found
    else:
        with pytest.raises((NotReadyError, UsageError), match=found):
            devices.detect(device)


@pytest.mark.parametrize(("architecture", "packs"), [("qwen3", True), ("mistral", False), ("gemma3_text", True)])
def test_a_decoder_keeps_no_keys_and_values(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, packs: bool
) -> None:
    import transformers

    from inferctl.serve.engines import plain as reference
    from inferctl.serve.engines.forward import Forward

    monkeypatch.delattr(transformers.DynamicCache, "__init__")  # a cache cannot be created
    pack = Forward.pack
    monkeypatch.setattr(Forward, "pack", lambda forward, on=True: pack(forward, on and packs))
    folder = tiny(architecture, "lasttoken")
    engine = encoder_engine(EngineConfig(model=str(folder), precision="fp32", device="cpu", max_batch_tokens=256))
    engine.load()
    assert engine.run(batch(sequences(5, 40))).ok.all()
    folder = tiny_models.make_cross_encoder(tmp_path, "qwen3")
    model = reference.Reference(folder, rerank_config.read(folder))
    assert model.score([(np.array([5, 6, 7], dtype=np.int32), 2)]).shape == (1, 1)


def test_a_gpu_warms_up_on_the_thread_that_serves(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines.forward import Forward

    forward, threads = Forward.__call__, set()

    def seen(self: Forward, rows: Any) -> Vectors:
        threads.add(threading.get_ident())
        return forward(self, rows)

    monkeypatch.setattr(Forward, "__call__", seen)
    with_gpu(monkeypatch)
    encoder_engine(EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", max_batch_tokens=256)).load()
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize(("device", "warned"), [("auto", 1), ("cpu", 0)])
def test_a_cuda_torch_without_a_usable_gpu_gives_the_reason_for_the_cpu(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, device: str, warned: int
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a usable GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", device=device)
    info, lines = started(encoder_engine(config))
    assert len(info.warnings) == warned
    assert sum("no usable GPU, so the CPU is used" in line for line in lines) == warned
    assert all("NVIDIA" in line or "compiled" in line for line in info.warnings), info.warnings


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_a_model_that_overflows_in_a_precision_does_not_start(tiny: Any, architecture: str) -> None:
    def enlarge(weights: dict[str, Any]) -> None:
        name = next(name for name in weights if name.endswith("layer.0.intermediate.dense.weight"))
        weights[name] *= 1e6

    folder = altered(tiny(architecture, "mean_tokens"), enlarge)
    config = EngineConfig(model=str(folder), precision="fp16", device="cpu")
    with pytest.raises(UsageError, match="NaN or infinity for 8 of 8 check texts in fp16") as caught:
        encoder_engine(config).load()
    assert "`--precision bf16`" in (caught.value.hint or "")
    assert encoder_engine(replace(config, precision="fp32")).load().within_limit


@pytest.mark.parametrize(("architecture", "attention"), [("bert", "packed"), ("mpnet", "padded")])
def test_an_inaccurate_precision_does_not_start_or_is_a_warning_and_is_not_attributed_to_packing(
    tiny: Any, architecture: str, attention: str
) -> None:
    def shift(weights: dict[str, Any]) -> None:
        # The following normalization subtracts this again. bf16 has steps of 0.5 at this size, fp32 is accurate.
        name = next(name for name in weights if name.endswith("word_embeddings.weight"))
        weights[name] += 100

    folder = altered(tiny(architecture, "mean_tokens"), shift)
    config = EngineConfig(model=str(folder), precision="bf16", device="cpu")
    with pytest.raises(UsageError, match=r"bf16 is inaccurate: cosine to fp32 0\.") as caught:
        encoder_engine(config).load()
    assert "`--allow-inaccurate`" in (caught.value.hint or "")
    info, lines = started(encoder_engine(replace(config, allow_inaccurate=True)))
    assert info.attention == attention
    # MPNet adds a position bias to its attention, which packing does not support.
    assert ("differs" in info.attention_reason) == (attention == "padded")
    assert (info.within_limit, info.cosine_limit) == (False, 0.99)
    assert sum(line.startswith("warning    bf16 is inaccurate: cosine to fp32 0.") for line in lines) == 1


def test_packing_of_a_large_model_is_compared_with_padding(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines import checks, encoder, packed

    attention = packed.attention

    def scaled(*arguments: Any, scaling: float | None = None, **keywords: Any) -> Any:
        return attention(*arguments, scaling=5.0, **keywords)

    monkeypatch.setattr(checks, "_MAX_CHECKED_PARAMETERS", 0)
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp32", device="cpu")
    assert encoder.EncoderEngine(config).load().attention == "packed"
    # Wrong in the same way for single texts and for batches.
    monkeypatch.setattr(packed, "attention", scaled)
    info = encoder.EncoderEngine(config).load()
    assert (info.attention, info.within_limit) == ("padded", True)
    assert "differs from padded" in info.attention_reason


@pytest.mark.parametrize(
    ("packed_change", "padded_change", "attention"),
    [
        (0.0, 0.0, "packed"),
        (0.01, 0.0, "packed"),  # LLM.int8
        (0.03, 0.02, "packed"),  # noise of the number format
        (0.03, 0.0, "padded"),  # neighbors
        (0.045, 0.02, "padded"),  # more than twice the noise
        (0.0, 0.06, "padded"),  # farther from padded than bf16 may be
    ],
)
def test_a_result_that_depends_on_neighbors_is_told_from_noise(
    packed_change: float, padded_change: float, attention: str
) -> None:
    """The changes are those of a result in a batch to the same text alone."""
    from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
    from inferctl.serve.engines import checks
    from inferctl.serve.engines.prepared import Sequences

    class Forward:
        change = padded_change

        def pack(self, on: bool = True) -> None:
            self.change = packed_change if on else padded_change

        def __call__(self, sequences: Sequences) -> Vectors:
            change = self.change if len(sequences) > 1 else 0.0
            return np.full((len(sequences), 1), 1 + change, np.float32)

    check = checks.Checks.__new__(checks.Checks)  # its texts alone: no model is needed
    check._logits, check.texts = True, Sequences([np.array([index], np.int32) for index in range(3)])
    forward: Any = Forward()
    chosen = check.choose_attention(forward, PrecisionInfo("bf16", "bf16", "native", ""))
    assert ("padded" if chosen[2] else "packed") == attention


@pytest.mark.parametrize(("capability", "on"), [((7, 5), False), ((8, 0), True)])
def test_tf32_is_reported_if_fp32_uses_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], on: bool
) -> None:
    import torch

    from inferctl.serve.engines import device

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    found, _ = device.choose("fp32", precision.DeviceTraits("cuda", compute_capability=capability))
    assert (found.tf32, "TF32" in found.reason) == (on, on)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert not device.choose("fp32", precision.DeviceTraits("cuda", compute_capability=capability))[0].tf32
