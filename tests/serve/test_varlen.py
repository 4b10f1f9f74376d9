"""Packed attention: the calls of torch's variable-length kernel, and the attention of CPUs, against a plain reference.

The kernel needs a GPU. A function with its signature replaces it. The signatures are copied from
`torch/nn/attention/varlen.py` in the manylinux x86_64 wheels on PyPI. 2.12.1 to 2.15.0 are equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from inferctl.serve.engine_process.engine_protocol import EngineConfig
from inferctl.serve.observe import describe
from tests.serve.test_encoder import with_gpu

LENGTHS = [33, 32, 32, 17, 16, 3, 1]


def per_sequence(
    rows: tuple[Any, Any, Any],
    lengths: list[int],
    scale: float | None,
    seen: Callable[[Any], Any],
    key_lengths: list[int] | None = None,
) -> Any:
    """Return the attention of [tokens, heads, size], one sequence at a time. `seen` gets query minus key position.

    Rows behind the last sequence are NaN. With more keys than queries, the queries are the last tokens.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = rows
    k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out, start, first_key = torch.full_like(query, torch.nan), 0, 0
    for count, keys in zip(lengths, key_lengths or lengths, strict=True):
        parts = query[start : start + count], *(t[first_key : first_key + keys] for t in (k, v))
        at = torch.arange(keys)
        mask = seen(at[keys - count :, None] - at)
        a, b, c = (t.transpose(0, 1)[None] for t in parts)
        if count:
            attended = scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=scale)
            out[start : start + count] = attended[0].transpose(0, 1)
        start, first_key = start + count, first_key + keys
    return out


Window: TypeAlias = tuple[int, int]
# The parameters of torch 2.12.1.
RECORDED = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size"]
RECORDED += ["enable_gqa", "seqused_k", "block_table", "num_splits"]


def torch_2_11_0(*rows: Any, scale: float | None = None, window_size: Window = (-1, -1)) -> Any:
    raise NotImplementedError


def broken(*_: Any, scale: float | None = None, window_size: Window = (-1, -1), enable_gqa: bool = False) -> Any:
    raise RuntimeError("no kernel for this head size")


def torch_2_12_1(
    *rows: Any, scale: float | None = None, window_size: Window = (-1, -1), enable_gqa: bool = False
) -> Any:
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k = rows
    lengths, key_lengths = (ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q >= max(lengths) and max_k >= max(key_lengths)
    before, after = (10**6 if reach < 0 or reach >= max_k else reach for reach in window_size)
    return per_sequence(
        (query, key, value), lengths, scale, lambda distance: (distance <= before) & (-distance <= after), key_lengths
    )


class Module:
    def __init__(self, causal: bool) -> None:
        self.is_causal = causal


def test_the_installed_kernel_has_the_recorded_signature() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert list(inspect.signature(varlen_attn).parameters) == RECORDED


@pytest.mark.parametrize("path", ["varlen", "fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("scaling", "window"), [(None, None), (0.5, None), (None, 5), (0.1, 20)])
def test_packed_attention_equals_attention_per_sequence(
    monkeypatch: pytest.MonkeyPatch, path: str, causal: bool, kv_heads: int, scaling: float | None, window: int | None
) -> None:
    import torch

    from inferctl.serve.engines import packed

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_12_1)
    dtype = torch.bfloat16 if path == "bf16" else torch.float32
    torch.manual_seed(5)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 16, dtype=dtype) for heads in (4, kv_heads, kv_heads))
    layout = packed.varlen_layout(LENGTHS) if path == "varlen" else packed.layout(LENGTHS, dtype)
    got = packed.attention(Module(causal), query, key, value, None, scaling, window, layout)[0][0]

    reach = 10**6 if window is None else window
    q, k, v = (t[0].transpose(0, 1).float() for t in (query, key, value))
    expected = per_sequence(
        (q, k, v),
        LENGTHS,
        scaling,
        lambda distance: (distance < reach) & (distance >= 0 if causal else distance > -reach),
    )
    tolerance = 0.03 if path == "bf16" else 1e-5
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "varlen"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (20, 0.5), (None, 1.0)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_common_start_is_attended_to_as_if_each_sequence_had_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    import torch

    from inferctl.serve.engines import packed

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(5)
    rows = [torch.randn(1, heads, 19 + sum(LENGTHS), 16, dtype=dtype) for heads in (4, kv_heads, kv_heads)]

    if varlen := precision == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_12_1)
        softcap = None

    def attend(rows: list[Any], lengths: list[int], *, shared: bool) -> Any:
        layout = (
            packed.varlen_layout(lengths, shared=True)
            if shared and varlen
            else packed.layout(lengths, dtype, shared=shared)
        )
        options = {"layout": layout, "softcap": softcap}
        return packed.attention(Module(True), *rows, None, sliding_window=window, **options)[0][0]

    got = attend(rows, [19, *LENGTHS], shared=True)
    start, *parts = zip(*(t.split([19, *LENGTHS], dim=2) for t in rows), strict=True)
    whole = [torch.cat([torch.cat((start[i], part[i]), dim=2) for part in parts], dim=2) for i in range(3)]
    alone = attend(whole, [19 + n for n in LENGTHS], shared=False).split([19 + n for n in LENGTHS])
    expected = torch.cat([alone[0][:19], *(part[19:] for part in alone)])
    tolerance = 0.03 if precision == "bf16" else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("release", "kernel", "attention", "reason"),
    [
        ("2.11.0", torch_2_11_0, "padded", "variable-length attention needs torch 2.12, this is 2.11.0"),
        ("2.12.1", torch_2_12_1, "packed", "equals the padded result"),
        ("2.12.1", broken, "padded", "RuntimeError: no kernel for this head size"),
    ],
)
def test_padding_on_a_gpu_that_could_pack_is_a_warning_with_the_reason(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, release: str, kernel: Any, attention: str, reason: str
) -> None:
    import torch

    from inferctl.serve.engines.encoder import EncoderEngine

    with_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(torch, "__version__", release)
    config = EngineConfig(model=str(tiny("modernbert", "mean_tokens")), precision="fp16", max_batch_tokens=256)
    info = EncoderEngine(config).load()
    assert (info.attention, reason in info.attention_reason) == (attention, True), info.attention_reason
    lines = list(describe.lines(info))
    assert any(attention in line and reason in line for line in lines)
    assert any(info.graphs in line for line in lines if line.startswith("graphs"))
    assert (info.graphs == "none: attention is padded") == (attention == "padded")
    warned = [line for line in lines if line.startswith("warning") and "padded" in line]
    assert [reason in line for line in warned] == ([True] if attention == "padded" else [])


@pytest.mark.parametrize(
    ("capability", "precision", "architecture", "warns"),
    [
        ((7, 5), "fp16", "bert", False),  # no kernel for this GPU
        ((9, 0), "fp32", "bert", False),
        ((9, 0), "fp16", "mpnet", True),  # its bias of relative positions is in the mask
        ((9, 0), "fp16", "qwen3", False),
    ],
)
def test_padding_that_the_hardware_requires_is_no_warning(
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    precision: str,
    architecture: str,
    warns: bool,
) -> None:
    from inferctl.serve.engines.encoder import PADDED, EncoderEngine

    with_gpu(monkeypatch, capability)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_12_1)
    folder = tiny(architecture, "mean_tokens")
    info = EncoderEngine(EngineConfig(model=str(folder), precision=precision, max_batch_tokens=256)).load()
    assert any(warning.startswith(PADDED) for warning in info.warnings) == warns, info.warnings


@pytest.fixture
def cudnn_on() -> Iterator[None]:
    """Let attention run on cuDNN, torch's default, and again after the test."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    ("causal", "window", "expected"), [(False, None, (512, 512)), (True, None, (512, 0)), (False, 64, (63, 63))]
)
def test_the_kernel_always_gets_a_window(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, expected: tuple[int, int]
) -> None:
    """Without one, torch 2.14 takes cuDNN on Hopper and Blackwell, whatever `enable_cudnn_sdp` says."""
    import torch

    from inferctl.serve.engines import packed

    seen: list[tuple[int, int]] = []

    def kernel(query: Any, *_: Any, scale: Any, window_size: Any, enable_gqa: bool) -> Any:
        seen.append(tuple(window_size))
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    rows = (torch.zeros(1, 12, 515, 64) for _ in range(3))
    packed.attention(Module(causal), *rows, None, None, window, packed.varlen_layout([512, 3]))
    assert seen == [expected]


@pytest.mark.usefixtures("cudnn_on")
def test_only_an_engine_on_a_gpu_turns_cudnn_attention_off(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from inferctl.serve.engines.encoder import EncoderEngine

    folder = str(tiny("bert", "mean_tokens"))
    EncoderEngine(EngineConfig(model=folder, precision="fp32", device="cpu", max_batch_tokens=256)).load()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with_gpu(monkeypatch)  # padded attention, which torch 2.13 gives to cuDNN too
    EncoderEngine(EngineConfig(model=folder, precision="fp16", max_batch_tokens=256)).load()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
