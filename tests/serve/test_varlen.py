"""Calls of torch's variable-length attention kernel with the signature that each release has.

The kernel needs a GPU. Functions with the recorded signatures replace it and compute the same with
`scaled_dot_product_attention`, one sequence at a time. The signatures are copied from `torch/nn/attention/varlen.py` in
the manylinux x86_64 wheels for Python 3.12 on PyPI, read on 2026-11-26. 2.12.1, 2.13.0, 2.14.1 and 2.15.0 are equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.functional import scaled_dot_product_attention  # noqa: E402  # torch may be missing

from inferctl.serve.engine_process.engine_protocol import EngineConfig  # noqa: E402
from inferctl.serve.engines import packed  # noqa: E402

LENGTHS = [7, 5, 5, 1]


def exact(query: Any, key: Any, value: Any, offsets: Any, scale: float | None, mask: Callable[[Any], Any]) -> Any:
    out = torch.empty_like(query)
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        at = torch.arange(end - start)
        seen = mask(at[:, None] - at[None, :])
        out[start:end] = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)[0].transpose(0, 1)
    return out


def within(window_size: tuple[int, int]) -> Callable[[Any], Any]:
    before, after = (10**6 if reach < 0 else reach for reach in window_size)
    return lambda distance: (distance <= before) & (-distance <= after)


def torch_2_10_0(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Any:
    assert query.shape[1] == key.shape[1], "2.10 documents one number of heads"
    return exact(query, key, value, cu_seq_q, None, within((-1, 0) if is_causal else (-1, -1)))


def torch_2_11_0(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    assert query.shape[1] == key.shape[1], "2.11 documents one number of heads"
    return exact(query, key, value, cu_seq_q, scale, within(window_size))


def torch_2_12_1(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Any:
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return exact(query, k, v, cu_seq_q, scale, within(window_size))


RELEASES = {"2.10.0": torch_2_10_0, "2.11.0": torch_2_11_0, "2.12.1": torch_2_12_1}


class Module:
    def __init__(self, causal: bool) -> None:
        self.is_causal = causal


def attend(kv_heads: int, causal: bool, scaling: float | None, window: int | None, *, varlen: bool) -> Any:
    torch.manual_seed(5)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 16) for heads in (4, kv_heads, kv_heads))
    layout = packed.layout(LENGTHS, torch.device("cpu"), varlen=varlen)
    return packed.attention(Module(causal), query, key, value, None, scaling, window, layout)[0]


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", RELEASES[request.param])
    monkeypatch.setattr(torch, "__version__", request.param)
    return str(request.param)


def test_the_installed_kernel_has_one_of_the_recorded_signatures() -> None:
    from torch.nn.attention.varlen import varlen_attn

    recorded = [list(inspect.signature(function).parameters) for function in RELEASES.values()]
    assert list(inspect.signature(varlen_attn).parameters) in recorded


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_release_computes_attention_with_the_default_scale(release: str, kv_heads: int, causal: bool) -> None:
    for scaling in (None, 16**-0.5):
        got = attend(kv_heads, causal, scaling, None, varlen=True)
        torch.testing.assert_close(got, attend(kv_heads, causal, scaling, None, varlen=False))


@pytest.mark.parametrize(("scaling", "window", "missing"), [(0.5, None, "scale"), (None, 3, "window_size")])
@pytest.mark.parametrize("causal", [False, True])
def test_scale_and_window_work_from_2_11_and_are_rejected_before(
    release: str, causal: bool, scaling: float | None, window: int | None, missing: str
) -> None:
    if release == "2.10.0":
        with pytest.raises(packed.UnsupportedError, match=f"varlen_attn of torch 2.10.0 has no `{missing}` argument"):
            attend(4, causal, scaling, window, varlen=True)
        return
    got = attend(4, causal, scaling, window, varlen=True)
    torch.testing.assert_close(got, attend(4, causal, scaling, window, varlen=False))


def test_a_window_is_rejected_also_for_a_shorter_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_10_0)
    with pytest.raises(packed.UnsupportedError):
        attend(4, False, None, 4096, varlen=True)


@pytest.mark.parametrize(
    ("architecture", "release", "attention", "reason"),
    [
        ("bert", "2.10.0", "packed", "equals the padded result"),
        ("bert", "2.12.1", "packed", "equals the padded result"),
        ("modernbert", "2.10.0", "padded", "varlen_attn of torch 2.10.0 has no `window_size` argument"),
        ("modernbert", "2.12.1", "packed", "equals the padded result"),
    ],
)
def test_the_start_up_check_names_the_missing_argument_of_the_kernel(
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    release: str,
    attention: str,
    reason: str,
) -> None:
    from inferctl.serve import describe
    from inferctl.serve.engines.encoder import EncoderEngine

    layout = packed.layout

    def on_a_gpu(lengths: list[int], device: Any, **_: Any) -> Any:
        return layout(lengths, device, varlen=True)

    monkeypatch.setattr(packed, "layout", on_a_gpu)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", RELEASES[release])
    monkeypatch.setattr(torch, "__version__", release)
    engine = EncoderEngine(EngineConfig(model=str(tiny(architecture, "mean_tokens")), precision="fp32", device="cpu"))
    info = engine.load()
    assert (info.attention, reason in info.attention_reason) == (attention, True), info.attention_reason
    assert "TypeError" not in info.attention_reason
    assert any(attention in line and reason in line for line in describe.lines(info, "tiny", "http://x", 1.0))
    assert (attention == "padded") == any(reason in record.getMessage() for record in caplog.records)
    assert np.isfinite(engine._embed([np.array([5, 6, 7], dtype=np.int32)])).all()
