"""The interface between the API process and an engine. It needs no HTTP and no torch.

An engine runs in its own process (`main.py`) and has two methods: `load` and `run`. All data that crosses the
process border is one of the dataclasses here. Token ids and vectors are sent as raw arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from inferctl.config.spec import Task
from inferctl.models.flops import ModelFlops
from inferctl.reading.rows import Rows, Tokens

# The batch limit is never lowered below this (tokens).
MIN_BATCH_TOKENS = 64


@dataclass(frozen=True)
class EngineConfig:
    """The configuration of an engine. `model` is a folder; `max_input_tokens` and `max_batch_tokens` count tokens.

    `previous_info`: the `EngineInfo` (as JSON) of an earlier engine with the same configuration. If the device is the
    same, the engine uses it instead of running the start-up checks again. `engines`: how many engines divide the cores
    of a CPU. `batch_threads`: of a batch on a CPU; None if a measurement at the start chooses them.
    `allow_inaccurate`: start also if a reduced precision is farther from fp32 than its limit. The task decides what the
    rows of a result are: vectors for `embed`, else logits, without the activation. `rerank` gives one logit for each
    pair of texts, `classify` one for each label.
    """

    engine: Literal["encoder", "echo"] = "encoder"
    task: Task = "embed"
    model: str = ""
    precision: str = "auto"
    device: str = "auto"
    max_input_tokens: int | None = None
    max_batch_tokens: int = 16384
    engines: int = 1
    batch_threads: int | None = None
    log: str = "text"
    allow_inaccurate: bool = False
    previous_info: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrecisionInfo:
    """The number format that an engine uses. `method` names the library path: `torch` or `bitsandbytes LLM.int8`.

    `tf32`: whether the device computes fp32 matrix products in TF32.
    """

    requested: str
    effective: str
    level: str
    reason: str
    method: str = "torch"
    tf32: bool = False


@dataclass(frozen=True)
class DeviceInfo:
    """The device of the forward pass.

    `memory_bytes`: the memory of the whole device (CPU: of the machine). `hardware`: a key of the catalog. `count`: how
    many equal GPUs `auto` or `cuda` can use, each with its own engine.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    compute_capability: str | None
    memory_bytes: int
    threads: int | None = None
    hardware: str | None = None
    count: int = 1


@dataclass(frozen=True)
class MatrixRate:
    """The FLOP/s of matrix products in the precision of an engine: its limit. `source`: measured, or the catalog."""

    flops_per_s: float
    source: Literal["measured", "catalog"]


@dataclass(frozen=True)
class EngineInfo:
    """The properties of an engine that is loaded, warmed up and checked.

    `batch_tokens`: the largest useful batch (tokens). `parallel`: how many batches run at a time. `idle_parallel`: how
    many more run while cores are idle, each on one core.
    `vocabulary_size`: rows of the model's input embeddings, so token ids are below it; 0 if unknown.
    `causal`: whether tokens attend only to those before them, else to all of their sequence; None if unknown.
    `cosine_min`, `cosine_mean`: similarity to a plain padded fp32 forward of the same weights, lower than the cosine if
    lengths differ; None without that comparison (`check` gives the reason). `cosine_limit`: the lowest expected
    `cosine_min` of this precision. Other tasks than `embed` have `logit_error` instead: the largest difference to fp32
    logits, relative to the largest of these.
    `dimensions` is then the number of labels; for `embed`, 0 without a dense vector. `token_dimensions`: of the vector
    of a token, 0 without them.
    `graphs`: which CUDA graphs there are, or why there is none; empty on a CPU.
    `flops`: what the model computes; None if it has no matrix products. `matrix_rate`: None if it is not known.
    `warnings`: problems of this start, for the user.
    """

    dimensions: int
    attention: str
    attention_reason: str
    precision: PrecisionInfo
    device: DeviceInfo
    batch_tokens: int
    parallel: int = 1
    idle_parallel: int = 0
    vocabulary_size: int = 0
    token_dimensions: int = 0
    causal: bool | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    cosine_limit: float | None = None
    logit_error: float | None = None
    logit_error_limit: float | None = None
    check: str = ""
    graphs: str = ""
    flops: ModelFlops | None = None
    matrix_rate: MatrixRate | None = None
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def within_limit(self) -> bool | None:
        """Whether the vectors or logits are as close to fp32 as expected; None if they were not compared."""
        if self.logit_error is not None and self.logit_error_limit is not None:
            return self.logit_error <= self.logit_error_limit
        if self.cosine_min is None or self.cosine_limit is None:
            return None
        return self.cosine_min >= self.cosine_limit

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineInfo:
        """Return the object that `to_json` converted."""
        kinds = {"precision": PrecisionInfo, "device": DeviceInfo, "flops": ModelFlops, "matrix_rate": MatrixRate}
        nested = {name: kind(**data[name]) for name, kind in kinds.items() if data[name] is not None}
        return cls(**{**data, **nested})


@dataclass(frozen=True)
class Batch:
    """The sequences of one forward pass.

    `tokens`: their ids, concatenated. `lengths`: one per sequence, none zero. `marks`: one number for each
    sequence, 0 by default. In a task that takes pairs, it is the index at which the second segment begins, 0 without
    one; in an embedding model, a mark of `outputs.py`, 0 for a dense vector. None if all are 0. `idle`: whether it
    runs only while cores are idle.
    """

    id: int
    tokens: Tokens
    lengths: Tokens
    marks: Tokens | None = None
    idle: bool = False


@dataclass(frozen=True)
class BatchResult:
    """The rows of a batch, float32. `ok[i]` is False if row i has NaN or infinity.

    `seconds`: that it ran; of a batch for idle cores without the time of others in between.
    `flops`: the floating-point operations that its sequences needed, without padding.
    """

    id: int
    rows: Rows
    ok: npt.NDArray[np.bool_]
    seconds: float
    flops: float = 0.0


# Does the work of the host, on any thread. Returns what launches the batch, which returns what waits for its rows
# and FLOP.
Prepare: TypeAlias = Callable[[Batch], Callable[[], Callable[[], tuple[Rows, float]]]]


class EngineProcess(Protocol):
    """An engine in another process, as the API process uses it."""

    def send(self, batch: Batch) -> None:
        """Send a batch to the engine. If the engine ended, `Listener.engine_lost` follows."""


class Listener(Protocol):
    """Receives the events of the engines, on the event loop of the API process."""

    def engine_ready(self, engine: EngineProcess, info: EngineInfo) -> None:
        """The engine accepts batches from now on."""

    def engine_lost(self, engine: EngineProcess) -> None:
        """A ready engine ended. Its batches in flight are lost, and it accepts no more."""

    def batch_done(self, engine: EngineProcess, result: BatchResult) -> None:
        """A batch completed."""

    def batch_failed(self, engine: EngineProcess, number: int, message: str, out_of_memory: bool) -> None:
        """A batch raised. The engine still runs."""


class Engine(Protocol):
    """Turns batches of token ids into vectors.

    `prepare`: of a GPU, which computes what the host launches, so that it can have the next batch before it is done
    with one. Without it, `run` is called.
    """

    prepare: Prepare | None

    def load(self, on_phase: Callable[[str], None] = ...) -> EngineInfo:
        """Load the weights, warm up, compare with fp32. Raises `InferctlError` for what the user can fix."""

    def run(self, batch: Batch) -> BatchResult:
        """Run one forward pass. At most `EngineInfo.parallel` calls run at a time.

        An exception fails this batch only, unless `failures.breaks_context` says that it broke the CUDA context.
        """
