"""The engine protocol: what the API process asks of an engine, and what it gets back. No HTTP, no torch.

An engine lives in its own process (`worker.py`) and has three verbs: `load`, `run`, `close`. Everything that crosses the process border is
one of the dataclasses here; token ids and vectors travel as raw arrays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]
Vectors: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is told when it starts. `model` is a folder; `max_input_tokens` and `max_batch_tokens` count tokens.

    `known`: the `EngineInfo` (as JSON) that an engine with the same configuration found on this device before: it is not found again.
    """

    engine: Literal["encoder", "echo"] = "encoder"
    model: str = ""
    precision: str = "auto"
    device: str = "auto"
    max_input_tokens: int | None = None
    max_batch_tokens: int = 16384
    echo_dimensions: int = 8
    log: str = "text"
    known: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrecisionInfo:
    """The number format that really runs. `method` names the library path, as in `torch` or `bitsandbytes LLM.int8`.

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
    """Where the forward pass runs. `memory_bytes` is the whole device's (CPU: the machine's); `hardware` is a key of the catalog.

    `count`: devices like this that `auto` may use, each by an engine of its own.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    compute_capability: str | None
    memory_bytes: int
    threads: int | None = None
    hardware: str | None = None
    count: int = 1


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says about itself once it is loaded, warm and checked.

    `batch_tokens` is the largest batch worth sending (tokens), `parallel` how many batches run at a time; `cosine_*` compare with a plain padded fp32 forward of the same weights
    and are None when that comparison was not made (`check` says why). `cosine_limit` is the lowest `cosine_min` that is
    expected of this precision. `warnings`: what the user should know about this start.
    """

    dimensions: int
    attention: str
    attention_reason: str
    precision: PrecisionInfo
    device: DeviceInfo
    batch_tokens: int
    parallel: int = 1
    cosine_min: float | None = None
    cosine_mean: float | None = None
    cosine_limit: float | None = None
    check: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def within_limit(self) -> bool | None:
        """Whether the vectors are as close to fp32 as expected; None if they were not compared."""
        if self.cosine_min is None or self.cosine_limit is None:
            return None
        return self.cosine_min >= self.cosine_limit

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the wire."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineInfo:
        """The inverse of `to_json`."""
        nested = {"precision": PrecisionInfo(**data["precision"]), "device": DeviceInfo(**data["device"])}
        return cls(**{**data, **nested})


@dataclass(frozen=True)
class Batch:
    """Sequences for one forward pass: `tokens` is their ids end to end, `lengths` (one per sequence, none zero) says where they end.

    `exact` asks for fp32, whatever the engine runs otherwise: its last answer to this was not finite.
    """

    id: int
    tokens: Tokens
    lengths: Tokens
    exact: bool = False


@dataclass(frozen=True)
class BatchResult:
    """One row of `vectors` (float32, [sequences, dimensions]) per sequence; `ok[i]` is False where row i is not finite."""

    id: int
    vectors: Vectors
    ok: npt.NDArray[np.bool_]
    seconds: float


def finite_rows(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Which rows hold finite numbers only."""
    return np.asarray(np.isfinite(vectors).all(axis=1), dtype=np.bool_)


class Engine(Protocol):
    """Turns batches of token ids into vectors."""

    def load(self) -> EngineInfo:
        """Load the weights, warm up, check against fp32. Raises `InferctlError` for what the user can mend."""

    def run(self, batch: Batch) -> BatchResult:
        """One forward pass; at most `EngineInfo.parallel` at a time. An exception fails this batch only; the engine must stay usable."""

    def close(self) -> None:
        """Give back memory and devices."""
