"""What a batch copies between host and device, and that nothing waits for the device in between.

No GPU is needed. The meta device has shapes and no values, so that whatever would wait for a value fails there. A
stand-in for pinned memory and events lets a CPU take the copies of a GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inferctl.reading import task_config
from inferctl.reading.outputs import Form
from inferctl.reading.rows import Rows
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
from tests.reading.test_outputs import multi_vector, write_splade
from tests.serve.test_varlen import torch_2_12_1

EXPANSION = {"strategy": "fixed", "length": 24, "token": "[MASK]"}


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model for each kind of output."""
    place = tmp_path_factory.mktemp("transfer")
    return {
        "dense": tiny("bert", "mean_tokens"),
        "sparse": write_splade(place / "sparse", "bert"),
        "multi-vector": multi_vector(place / "tokens", "bert", ["the"], {"query_expansion": EXPANSION}),
    }


def texts(kind: str) -> Any:
    from inferctl.serve.engines.prepared import Sequences

    rng = np.random.default_rng(2)
    ids = [rng.integers(5, 900, length).astype(np.int32) for length in (3, 40, 9, 9, 17, 1, 3)]
    form = {"dense": 0, "sparse": Form.SPARSE, "multi-vector": Form.TOKENS}[kind]
    return Sequences(ids, [int(form)] * len(ids) if form else None)


def forward_of(
    folder: Path, device: str = "cpu", *, varlen: bool = False, task: Any = "embed", tokens: int = 512
) -> Any:
    import torch

    from inferctl.serve.engines.forward import Forward

    precision = PrecisionInfo("fp32", "fp32", "native", "")
    where = torch.device(device)
    return Forward(folder, task_config.read(task, folder), where, torch.float32, precision, tokens, varlen=varlen)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let a CPU be a device with memory of its own. Returns the copies that crossed: their bytes."""
    import torch

    from inferctl.serve.engines import transfer

    seen = SimpleNamespace(buffers=[], waits=0)

    def pinned(size: int) -> Any:
        seen.buffers.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def synchronize() -> None:
        seen.waits += 1

    event = SimpleNamespace(record=lambda _: None, synchronize=synchronize)
    monkeypatch.setattr(transfer, "on_host", lambda _: False)
    monkeypatch.setattr(transfer, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return seen


def same(found: Rows, expected: Rows) -> None:
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row, other)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
def test_a_batch_crosses_once_in_each_direction(
    kind: str, packs: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferctl.serve.engines import output_heads

    batch = texts(kind)
    forward = forward_of(folders[kind])
    forward.pack(packs)
    expected = forward(batch)
    seen = stand_in(monkeypatch)
    monkeypatch.setattr(output_heads, "_EXPECTED", 1200)
    forward = forward_of(folders[kind])
    forward.pack(packs)
    prepared = forward.prepare(batch)
    assert len(seen.buffers) == len(prepared.parts)
    launched = forward.launch(prepared)
    assert (len(seen.buffers), seen.waits) == (len(prepared.parts) + 1, 0)
    same(launched.rows(), expected)
    assert (len(seen.buffers), seen.waits) == (len(prepared.parts) + 1, 1)


def test_a_batch_with_more_weights_than_it_had_room_for_is_computed_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferctl.serve.engines import output_heads

    expected = forward_of(folders["sparse"])(texts("sparse"))
    seen = stand_in(monkeypatch)
    monkeypatch.setattr(output_heads, "_EXPECTED", 2)
    forward = forward_of(folders["sparse"])
    same(forward(texts("sparse")), expected)
    assert seen.waits > 1
    seen.waits = 0
    same(forward(texts("sparse")), expected)
    assert seen.waits == 1, "the next one has room"


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
def test_nothing_waits_for_the_device_while_a_batch_is_launched(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferctl.serve.engines import forward as forward_module

    stand_in(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, *_, **__: query)
    copies: list[Any] = []
    monkeypatch.setattr(forward_module, "HostCopy", copies.append)
    forward = forward_of(folders[kind], "meta", varlen=True)
    forward.pack()
    forward.launch(forward.prepare(texts(kind)))
    (tensors,) = copies
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_the_variable_length_kernel_gets_offsets_that_crossed_with_the_inputs(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_12_1)
    forward = forward_of(folders["dense"])
    expected = forward(texts("dense"))
    stand_in(monkeypatch)
    forward = forward_of(folders["dense"], varlen=True)
    forward.pack()
    np.testing.assert_allclose(forward(texts("dense")), expected, atol=1e-5)
