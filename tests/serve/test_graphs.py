"""CUDA graphs, with a stand-in for the GPU: it records the kernels of a forward pass and repeats them on a CPU.

As in a graph, the tensors that a kernel reads and writes are those of the recording, whatever the host does later, and
what is read from a tensor by the host cannot be recorded. After each run, all memory but the results is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inferctl.config.spec import Access
from inferctl.reading import task_config
from inferctl.reading.rows import Vectors
from inferctl.serve.engine_process.engine_protocol import EngineConfig, PrecisionInfo
from inferctl.serve.observe import describe
from tests import tiny_models
from tests.reading import language_rerankers
from tests.serve.test_encoder import with_gpu
from tests.serve.test_varlen import torch_2_12_1

TOTAL = 32 << 20  # the memory of the stand-in; graphs may use 1 MiB
FP32 = PrecisionInfo("fp32", "fp32", "native", "")


@cache
def stand_in() -> Any:
    """Return the stand-in for `Gpu`, and register one for the variable-length kernel that is recorded as one kernel."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    waiting = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh"}

    rows = "Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k"
    options = "float? scale, SymInt before, SymInt after, bool enable_gqa"

    @torch.library.custom_op("inferctl_tests::varlen", mutates_args=(), schema=f"({rows}, {options}) -> Tensor")
    def varlen(*given: Any) -> Any:
        scale, before, after, enable_gqa = given[7:]
        return torch_2_12_1(*given[:7], scale=scale, window_size=(before, after), enable_gqa=enable_gqa)

    def tensors(*given: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]

    class Recorded(TorchDispatchMode):
        """The kernels that run: operator, arguments, and which results have memory of their own, by index."""

        def __init__(self) -> None:
            super().__init__()
            self.kernels: list[tuple[Any, Any, Any, dict[int, Any]]] = []

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            masked = operator.overloadpacket.__name__ == "index" and any(
                t.dtype == torch.bool for t in tensors(args[1])
            )
            if masked or operator.overloadpacket.__name__ in waiting:
                raise RuntimeError(f"called a synchronizing CUDA operation: {operator}")
            result = operator(*args, **(kwargs or {}))
            known = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
            made = {at: t for at, t in enumerate(tensors(result)) if t.untyped_storage().data_ptr() not in known}
            self.kernels.append((operator, args, kwargs or {}, made))
            return result

    class Gpu:
        size, runs = 1000, 0

        def __init__(self, device: torch.device) -> None:
            self.reset()

        def reset(self) -> None:
            self.used = 0

        def warm_up(self, run: Callable[[], object]) -> None:
            with Recorded():
                run()

        def capture(self, run: Callable[[], object]) -> Callable[[], None]:
            self.used += self.size
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

        def memory(self) -> tuple[int, int]:
            return self.used, TOTAL

        def seconds(self, run: Callable[[], object]) -> float:
            before = Gpu.runs
            run()
            return 1.0 if Gpu.runs > before else 2.0

    def kernel(*rows: Any, scale: float | None = None, window_size: Any = (-1, -1), enable_gqa: bool = False) -> Any:
        return torch.ops.inferctl_tests.varlen(*rows, scale, *window_size, enable_gqa)

    return SimpleNamespace(Gpu=Gpu, kernel=kernel)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the stand-in, which is used instead of a GPU."""
    from inferctl.serve.engines import graphs

    monkeypatch.setattr(graphs, "Gpu", stand_in().Gpu)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in().kernel)
    return stand_in().Gpu


def forward_of(folder: Path, task: Any = "embed", tokens: int = 128) -> Any:
    """Return a forward pass in fp32 that uses the variable-length kernel."""
    import torch

    from inferctl.serve.engines.forward import Forward

    settings = task_config.read(task, folder, None)
    forward = Forward(folder, settings, torch.device("cpu"), torch.float32, FP32, tokens, varlen=True)
    forward.pack()
    return forward


def batches(tokens: int, longest: int, common: int = 0) -> list[Any]:
    """Return batches of random sequences with up to so many tokens, in random order. `common`: equal at the start."""
    from inferctl.serve.engines.prepared import Sequences

    random = np.random.default_rng(7)
    start = random.integers(5, 900, common)
    found = []
    for limit in (1, 3, 16, 17, 40, tokens // 2, tokens - 1, tokens, tokens + 1):
        lengths: list[int] = []
        while (left := limit - sum(lengths)) > 0:
            lengths.append(min(left, int(random.integers(1, longest + 1))))
        rows = [np.append(start, random.integers(5, 900, n)).astype(np.int32) for n in lengths]
        found.append(Sequences(rows, [max(1, len(row) // 2) for row in rows]))
    return [found[at] for at in random.permutation(len(found))]


def reference(folder: Path, task: Any) -> Callable[[Any], Vectors]:
    """Return a function that computes sequences one by one, with padded attention."""
    from inferctl.serve.engines import plain

    loaded = plain.Reference(folder, task_config.read(task, folder, None))
    if task == "embed":
        return lambda sequences: loaded.embed(sequences.ids)
    return lambda sequences: loaded.score(list(zip(sequences.ids, sequences.marks, strict=True)))


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([1], (16, 16, 16)),
        ([16], (16, 16, 16)),
        ([17], (32, 32, 32)),
        ([1] * 17, (32, 32, 32)),
        ([100, 29], (192, 192, 170)),
        ([8] * 64, (512, 512, 64)),
        ([7] * 65, (768, 128, 256)),  # too many sequences for the shapes of 512 tokens
        ([513], None),  # longer than the model allows
        ([129] + [10] * 40, (768, 512, 64)),
        ([512, 512, 512, 512], (2048, 512, 64)),
        ([8] * 256, (2048, 128, 256)),
        ([4] * 257, None),
        ([300] + [10] * 100, None),
        ([512, 512, 512, 513], None),
    ],
)
def test_a_batch_has_the_smallest_shape_that_it_fits(lengths: list[int], shape: tuple[int, int, int] | None) -> None:
    from inferctl.serve.engines import graphs

    known = graphs.shapes(4096, 512)
    assert (known, len(known) < 25) == (sorted(known), True)
    found = next((each for each in known if each.fits(lengths)), None)
    assert found == (None if shape is None else graphs.Shape(*shape))


@pytest.mark.parametrize("architecture", [*(name for name in tiny_models.TINY if name != "mpnet"), "pairs"])
def test_batches_of_all_sizes_equal_the_reference(tiny: Any, tmp_path: Path, gpu: Any, architecture: str) -> None:
    pairs = architecture == "pairs"
    task = "rerank" if pairs else "embed"
    folder = tiny_models.make_cross_encoder(tmp_path, "bert") if pairs else tiny(architecture, "mean_tokens")
    forward = forward_of(folder, task)
    assert forward.capture_graphs().startswith("6, for batches of up to 128 tokens, 0 MiB; 0.50 to 0.50 of")
    before, each, expected = gpu.runs, batches(128, 100), reference(folder, task)
    for sequences in each:
        wanted = expected(sequences)
        given = sequences if pairs else type(sequences)(sequences.ids)
        np.testing.assert_allclose(forward(given), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert gpu.runs - before == len(each) - 1  # all but the largest


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_common_start_is_computed_once_in_batches_without_a_graph(tmp_path: Path, gpu: Any, name: str) -> None:
    window = {"sliding_window": 40} if name == "mistral" else {}
    folder = language_rerankers.make(tmp_path, architecture=name, activation="Identity", **window)
    forward, expected = forward_of(folder, "rerank", 64), reference(folder, "rerank")
    forward.capture_graphs()
    shared = []
    for sequences in (each for common in (0, 15, 30) for each in batches(40, 12, common)):
        (part,) = forward.prepare(sequences).parts
        assert part.shape is None or part.shared == 0
        shared.append(part.shared)
        wanted = expected(sequences)
        np.testing.assert_allclose(forward(sequences), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert (set(shared) - {0, 30}, 30 in shared) == (set(), True)


def waits(_: Any, __: Any, states: Any) -> Any:
    """Read a state on the host: a hook of a layer."""
    return states if float(states.sum()) < 1e30 else None


def depends_on_the_host() -> Callable[..., Any]:
    """Return a hook of a layer that multiplies by another number each time, which a graph cannot know."""
    counted = iter(range(10**6))
    return lambda _, __, states: states * next(counted)


@pytest.mark.parametrize(
    ("case", "summary"),
    [
        ("padded", "none: attention is padded"),
        ("waits", "none: called a synchronizing CUDA operation"),
        ("differs", "none: the states of 64 tokens differ"),
        ("no faster", "none: not faster than single launches"),
        ("some memory", "2, for batches of up to 32 tokens, 0 MiB"),
        ("no memory", "none: insufficient memory"),
        ("out of memory", "2, for batches of up to 32 tokens, 0 MiB"),
    ],
)
def test_graphs_that_are_impossible_wrong_slow_or_large_are_left_out(
    tiny: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, case: str, summary: str
) -> None:
    import torch

    from inferctl.serve.engines import graphs

    forward = forward_of(tiny("bert", "mean_tokens"), tokens=64)
    layer = forward._encoder.encoder.layer[1].output.dense
    if case == "padded":
        forward.pack(False)
    elif case == "waits":
        layer.register_forward_hook(waits)
    elif case == "differs":
        layer.register_forward_hook(depends_on_the_host())
    elif case == "no faster":
        monkeypatch.setattr(gpu, "seconds", lambda *_: 1.0)
    elif case.endswith("memory"):
        monkeypatch.setattr(gpu, "size", {"some memory": TOTAL // 32 // 3, "no memory": TOTAL}.get(case, 0))
        capture = gpu.capture

        def limited(self: Any, run: Any) -> Any:
            if case == "out of memory" and max(forward._graphs._graphs, default=graphs.Shape(0, 0, 0)).tokens == 64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return capture(self, run)

        monkeypatch.setattr(gpu, "capture", limited)
    found = forward.capture_graphs()
    assert found.startswith(summary), found
    assert np.isfinite(forward(batches(64, 30)[0])).all()


def test_the_server_says_which_graphs_there_are(tiny: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines.encoder import EncoderEngine

    with_gpu(monkeypatch, (8, 0))
    config = EngineConfig(model=str(tiny("bert", "mean_tokens")), precision="fp16", max_batch_tokens=64)
    info = EncoderEngine(config).load()
    assert info.graphs.startswith("4, for batches of up to 64 tokens")
    assert f"graphs     {info.graphs}" in describe.lines(info, "tiny", "http://x", 1.0, Access())
    again = EncoderEngine(EngineConfig(**{**vars(config), "previous_info": info.to_json()})).load()
    assert again.graphs == info.graphs
