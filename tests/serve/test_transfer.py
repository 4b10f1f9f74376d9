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
    """Let a CPU be a device with memory of its own. Returns how often buffers and waits were used."""
    import torch

    from inferctl.serve.engines import transfer

    seen = SimpleNamespace(buffers=0, waits=0)

    def pinned(size: int) -> Any:
        seen.buffers += 1
        return torch.empty(size, dtype=torch.uint8)

    def synchronize() -> None:
        seen.waits += 1

    event = SimpleNamespace(record=lambda _: None, synchronize=synchronize)
    monkeypatch.setattr(transfer, "on_host", lambda _: False)
    monkeypatch.setattr(transfer, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return seen


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("kind", "room"), [("dense", 1), ("sparse", 1200), ("sparse", 2), ("multi-vector", 1)])
def test_a_batch_crosses_once_in_each_direction(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, room: int, packs: bool
) -> None:
    """If there is too little room for its weights, it is computed again, and the next one has room."""
    from inferctl.serve.engines import output_heads

    forward = forward_of(folders[kind])
    forward.pack(packs)
    expected = forward(texts(kind))
    seen = stand_in(monkeypatch)
    monkeypatch.setattr(output_heads, "_EXPECTED", room)
    forward = forward_of(folders[kind])
    forward.pack(packs)
    if kind == "sparse" and room == 2:
        forward(texts(kind))
        assert seen.waits > 1
    seen.buffers, seen.waits = 0, 0
    launched = forward.launch(prepared := forward.prepare(texts(kind)))
    assert (seen.buffers, seen.waits) == (len(prepared.parts) + 1, 0)
    for row, other in zip(launched.rows(), expected, strict=True):
        np.testing.assert_array_equal(row, other)
    assert (seen.buffers, seen.waits) == (len(prepared.parts) + 1, 1)


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
def test_nothing_waits_for_the_device_while_a_batch_is_launched(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from inferctl.serve.engines import forward as forward_module

    stand_in(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, *_, **__: query)
    copies: list[Any] = []
    monkeypatch.setattr(forward_module, "HostCopy", copies.append)
    forward = forward_of(folders[kind], "meta", varlen=True)
    forward.pack()
    forward.launch(forward.prepare(texts(kind)))
    assert all(tensor.device.type == "meta" for tensor in copies[0])


def test_the_variable_length_kernel_gets_offsets_that_crossed_with_the_inputs(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_12_1)
    expected = forward_of(folders["dense"])(texts("dense"))
    stand_in(monkeypatch)
    forward = forward_of(folders["dense"], varlen=True)
    forward.pack()
    np.testing.assert_allclose(forward(texts("dense")), expected, atol=1e-5)
