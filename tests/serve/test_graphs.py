"""CUDA graphs, with a stand-in for the GPU: it records the kernels of a forward pass and repeats them on a CPU.

As in a graph, a kernel reads and writes the tensors of the recording, whatever the host does later, and the host can
read none while it records. After each run, the memory of the recording is overwritten, as other graphs use it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inferctl.reading import task_config
from tests import tiny_models
from tests.serve.test_transfer import forward_of
from tests.serve.test_varlen import torch_2_12_1

WAITING = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh"}
LIMIT = 1000


@cache
def stand_in() -> SimpleNamespace:
    """Return stand-ins for `Gpu`, and for the variable-length kernel, which is recorded as one."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    rows = "Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k"
    schema = f"({rows}, float? scale, SymInt before, SymInt after, bool enable_gqa) -> Tensor"

    @torch.library.custom_op("inferctl_tests::varlen", mutates_args=(), schema=schema)
    def varlen(*given: Any) -> Any:
        scale, before, after, enable_gqa = given[7:]
        return torch_2_12_1(*given[:7], scale=scale, window_size=(before, after), enable_gqa=enable_gqa)

    def kernel(*given: Any, scale: float | None, window_size: Any, enable_gqa: bool = False) -> Any:
        return torch.ops.inferctl_tests.varlen(*given, scale, *window_size, enable_gqa)

    def tensors(*given: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]

    class Recorded(TorchDispatchMode):
        """The kernels that run: operator, arguments, and by index the results that have memory of their own."""

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = operator.overloadpacket.__name__
            if name in WAITING or (name == "index" and any(t.dtype == torch.bool for t in tensors(args[1]))):
                raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
            result = operator(*args, **(kwargs or {}))
            known = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
            made = {at: t for at, t in enumerate(tensors(result)) if t.untyped_storage().data_ptr() not in known}
            self.kernels = [*getattr(self, "kernels", []), (operator, args, kwargs or {}, made)]
            return result

    class Gpu:
        limit, size, runs = LIMIT, 1, 0

        def __init__(self, device: torch.device) -> None:
            self.graphs = 0

        def capture(self, run: Callable[[], object]) -> Callable[[], None]:
            self.graphs += 1
            with Recorded() as recorded:
                run()

            def repeat() -> None:
                for operator, args, kwargs, made in recorded.kernels:
                    again = tensors(operator(*args, **kwargs))
                    for at, tensor in made.items():
                        tensor.copy_(again[at])
                for tensor in (tensor for *_, made in recorded.kernels for tensor in made.values()):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
                Gpu.runs += 1

            return repeat

        def used(self) -> int:
            return self.graphs * self.size

        def seconds(self, run: Callable[[], object]) -> tuple[float, float]:
            before = Gpu.runs
            run()
            return (0.1, 1.0) if Gpu.runs > before else (2.0, 2.0)

    return SimpleNamespace(Gpu=Gpu, kernel=kernel)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the stand-in, which replaces a GPU."""
    monkeypatch.setattr("inferctl.serve.engines.graphs.Gpu", stand_in().Gpu)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in().kernel)
    return stand_in().Gpu


def batches(tokens: int, common: int = 0) -> list[Any]:
    """Return batches of random pairs with up to so many tokens, behind `common` equal ones, in random order."""
    from inferctl.serve.engines.prepared import Sequences

    random, found = np.random.default_rng(7), []
    start = random.integers(5, 900, common)
    for total in (1, 3, 16, 17, 40, tokens // 2, tokens - 1, tokens, tokens + 1):
        ends = np.unique([*random.integers(1, total + 1, total // 20), total])
        ids = [np.append(start, random.integers(5, 900, n)).astype(np.int32) for n in np.diff(ends, prepend=0)]
        found.append(Sequences(ids, [max(1, len(row) // 2) for row in ids]))
    return [found[at] for at in random.permutation(len(found))]


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([16], (16, 16, 16)),
        ([1] * 17, (32, 32, 32)),
        ([100, 29], (192, 192, 170)),
        ([7] * 64, (512, 512, 64)),
        ([7] * 65, (768, 128, 256)),  # too many sequences for 512 tokens
        ([129] + [10] * 40, (768, 512, 64)),
        ([512, 512, 512, 512], (2048, 512, 64)),
        ([513], None),  # longer than the model allows
        ([300] + [10] * 100, None),
        ([8] * 257, None),
    ],
)
def test_a_batch_has_the_smallest_shape_that_it_fits(lengths: list[int], shape: tuple[int, int, int] | None) -> None:
    from inferctl.serve.engines import graphs

    found = next((each for each in graphs.shapes(4096, 512) if each.fits(lengths)), None)
    assert found == (None if shape is None else graphs.Shape(*shape))


@pytest.mark.parametrize("architecture", [*(name for name in tiny_models.TINY if name != "mpnet"), "pairs"])
def test_rows_equal_those_of_the_reference(tiny: Any, tmp_path: Path, gpu: Any, architecture: str) -> None:
    """In batches with a graph, and in larger ones, where the common start of decoders is computed once."""
    from inferctl.serve.engines import plain

    pairs, decoder = architecture == "pairs", architecture in ("qwen3", "mistral", "gemma3_text")
    pooling, task = "lasttoken" if decoder else "mean_tokens", "rerank" if pairs else "embed"
    folder = tiny_models.make_cross_encoder(tmp_path, "bert") if pairs else tiny(architecture, pooling)
    forward = forward_of(folder, task=task, tokens=128, varlen=True)
    forward.pack()
    assert forward.capture_graphs().startswith("6 for batches of up to 128 tokens"), forward.capture_graphs()
    reference, parts, before = plain.Reference(folder, task_config.read(task, folder, None)), [], gpu.runs
    for sequences in (each for common in (0, 15, 30) for each in batches(128, common)):
        given = sequences if pairs else type(sequences)(sequences.ids)
        parts += forward.prepare(given).parts
        both = list(zip(sequences.ids, sequences.marks, strict=True))
        expected = reference.score(both) if pairs else reference.embed(sequences.ids)
        np.testing.assert_allclose(forward(given), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    fitting = [part for part in parts if part.shape]
    assert (len(fitting), {part.shared for part in fitting}) == (gpu.runs - before, {0})
    assert {part.tokens <= 128 for part in fitting} == {True}
    assert {part.shared for part in parts} == ({0, 30} if decoder else {0})


def waits(_: Any, __: Any, states: Any) -> Any:
    """Read a state on the host: a hook of a layer."""
    return states if float(states.sum()) < 1e30 else None


def changes() -> Callable[..., Any]:
    """Return a hook of a layer that changes a sign each time, which only the host knows."""
    signs = cycle((1, -1))
    return lambda _, __, states: states * next(signs)


@pytest.mark.parametrize(
    ("case", "summary", "most"),
    [
        ("padded", "none: attention is padded", 0),
        ("waits", "none: called a synchronizing CUDA operation", 0),
        ("changes", "none: the states of 64 tokens differ", 0),
        ("launches in no time", "none: single launches", 0),
        ("as fast", "none: single launches", 0),
        ("too large", "none: graphs may use", 0),
        ("some memory", "2 for batches", 32),
        ("out of memory", "2 for batches", 32),
    ],
)
def test_graphs_that_are_impossible_wrong_slow_or_large_are_left_out(
    tiny: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, case: str, summary: str, most: int
) -> None:
    forward, capture = forward_of(tiny("bert", "mean_tokens"), tokens=64, varlen=True), gpu.capture
    if hook := {"waits": waits, "changes": changes()}.get(case):
        forward._encoder.encoder.layer[1].output.dense.register_forward_hook(hook)
    forward.pack(case != "padded")
    monkeypatch.setattr(gpu, "size", {"too large": LIMIT + 1, "some memory": LIMIT // 3}.get(case, 0))

    def limited(self: Any, run: Any) -> Any:
        if case == "out of memory" and forward._graphs.shape([64]):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return capture(self, run)

    monkeypatch.setattr(gpu, "capture", limited)
    if seconds := {"launches in no time": (0.1, 2.0), "as fast": (1.0, 1.0)}.get(case):
        monkeypatch.setattr(gpu, "seconds", lambda *_: seconds)
    assert forward.capture_graphs().startswith(summary)
    parts = [part for each in batches(32) for part in forward.prepare(type(each)(each.ids)).parts]
    assert max((part.tokens for part in parts if part.shape), default=0) == most
