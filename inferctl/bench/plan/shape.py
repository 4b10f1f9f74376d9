"""The load of a plan: a closed or an open loop, optionally in stages or with a spike."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from inferctl.config.spec_types import Section, Task
from inferctl.core.errors import UsageError

# Matches `60%`, as in `rate: 60%`.
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
# A run at a rate in percent of the capacity lasts until it has enough responses for a p99, or this many seconds.
# A longer `duration_s` in the plan takes precedence. A p99 needs 368 responses; the margin is 15%.
_RESPONSES, _LONGEST_S = 1.15 * 368, 60.0

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]
# Names of models and adapters, each with its share of the requests; `uniform`, `zipf` or, with an exponent, `zipf:1.2`.
Mix = (
    dict[Annotated[str, Field(min_length=1, max_length=200)], Annotated[float, Field(gt=0, le=1e6)]]
    | Annotated[str, Field(pattern=r"^(uniform|zipf(:\d+(\.\d+)?)?)$")]
)
# Documents of a rerank request.
DOCUMENTS = 16
# Keys of a section as YAML or a command line has them, before validation.
Keys = dict[str, object]
# The keys of a load that describe its loop, its rate over time and what is measured for it before.
_SHAPE = {"mode", "rate", "auto_users", "capacity_percent", "stages", "spike"}


class Stage(Section):
    """A part of a load with its own rate (open loop, requests/s) or its own number of users (closed loop)."""

    duration_s: float = Field(gt=0, le=86_400, description="Seconds of the stage.")
    # Not `Field(None, ...)`, in which mypy sees no default.
    rate: Annotated[float | None, Field(ge=0, le=100_000, description="Open loop: requests/s.")] = None
    users: Annotated[int | None, Field(ge=0, le=10_000, description="Closed loop: number of users.")] = None
    name: Annotated[Name | None, Field(description="Name of the stage.")] = None


class Spike(Section):
    """A burst that starts at `at_s`, lasts `duration_s` and multiplies the rate or the users by `times`."""

    at_s: float = Field(gt=0, le=86_400, description="Second at which it starts.")
    duration_s: float = Field(gt=0, le=86_400, description="Seconds that it lasts.")
    times: float = Field(gt=0, le=1000, description="Factor on the rate or the users.")


class Generation(Section):
    """Requests to generation servers: their lengths in tokens, and when a response counts as good.

    `lengths` names a distribution of benchmarks/corpora or a CSV file, instead of `input_tokens` and `output_tokens`.
    Its rows with more than `max_request_tokens` (input and output together) are left out. `common_prefix` is the share
    of the shortest prompt with which all prompts start. A response is good if its first token comes within `ttft_ms`
    and no gap between its events is longer than `itl_ms`.
    """

    input_tokens: int = Field(128, ge=1, le=1_000_000, description="Tokens of each prompt.")
    output_tokens: int = Field(64, ge=1, le=1_000_000, description="Tokens of each output.")
    lengths: str | None = Field(None, description="A distribution (`azure-llm-2023`) or a CSV file instead of both.")
    max_request_tokens: int | None = Field(
        None, ge=2, le=2_000_000, description="Leave out rows of `lengths` with more tokens in all."
    )
    common_prefix: float = Field(
        0.0, ge=0, le=0.95, description="Share of the tokens of the shortest prompt with which all prompts start."
    )
    ttft_ms: float | None = Field(
        None,
        gt=0,
        le=3_600_000,
        description="Longest time to the first token of a good response. Default: the spec's `slo.ttft_ms`.",
    )
    itl_ms: float | None = Field(
        None, gt=0, le=3_600_000, description="Longest gap of a good response. Default: the spec's `slo.itl_ms`."
    )

    @model_validator(mode="after")
    def _check(self) -> Generation:
        fields = type(self).model_fields
        # A load in JSON form has the defaults of all keys.
        if self.lengths and any(getattr(self, key) != fields[key].default for key in ("input_tokens", "output_tokens")):
            raise ValueError("lengths cannot be combined with input_tokens and output_tokens: keep one of them")
        if self.max_request_tokens and not self.lengths:
            raise ValueError("max_request_tokens requires lengths")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds of a good response in ms, by `ttft` and `itl`; empty if there are none."""
        return {key: value for key, value in (("ttft", self.ttft_ms), ("itl", self.itl_ms)) if value is not None}


class Load(Section):
    """The requests that a server receives: loop, rate or users, duration and inputs. `timeline` lists its stages.

    `rate: 60%` is stored as `capacity_percent`; `at` sets the rate after the capacity is measured.
    `users: auto` is stored as `auto_users`; `users` is set after the concurrency is found.

    `task` is that of the models (`Plan.for_task`). For `rerank`, the inputs of a request are the documents of a query.
    For `generate`, `generation` describes the requests. Embeddings requests select the prompt `prompt_name`, or those
    of the share `query_share` are queries and the others documents.
    """

    task: Task = Field("embed", description="Task of the models. Set by the benchmark.")
    mode: Literal["closed", "open"] = Field(
        "closed", description="`closed` or `open`. Follows from `rate: 60%` or `stages`."
    )
    users: int = Field(8, ge=1, le=10_000, description="Closed loop: number of users, or `auto`.")
    auto_users: bool = Field(False, description="Set by `users: auto`.")
    rate: float | None = Field(
        None, gt=0, le=100_000, description="Open loop: requests/s, or a share of the capacity as in `60%`."
    )
    capacity_percent: float | None = Field(None, gt=0, le=100, description="Set by `rate: 60%`.")
    capacity_s: float = Field(5, ge=1, le=3600, description="Seconds of the closed loop that measures the capacity.")
    arrivals: Literal["poisson", "constant"] = Field("poisson", description="Open loop: `poisson` or `constant`.")
    stages: list[Stage] = Field(
        default_factory=list, max_length=1000, description="Parts of the load, one after the other."
    )
    spike: Spike | None = Field(None, description="A burst.")
    duration_s: float = Field(15, ge=1, le=86_400, description="Seconds of the measurement.")
    warmup_s: float = Field(15, ge=0, le=3600, description="Limit of the warm-up in seconds.")
    window_s: float = Field(1, ge=0.2, le=60, description="Window of the warm-up in seconds.")
    timeout_s: float = Field(30, gt=0, le=3600, description="Limit of a request in seconds. For generation, 300.")
    max_outstanding: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Open loop: drop and count sends above this number of requests in flight; shared by the workers.",
    )
    inputs_per_request: int = Field(
        1, ge=1, le=2048, description="Texts per request. For rerank: documents per request, 16 by default."
    )
    inputs: Literal["unique", "as-is", "zipf"] = Field(
        "unique",
        description="`unique` adds two numbers (about four tokens) to each text, so that no cache responds. `as-is` "
        "adds nothing. `zipf` repeats popular texts.",
    )
    zipf_s: float = Field(1.0, ge=0, le=10, description="The k-th most popular text has weight 1 / k^s.")
    zipf_share: float = Field(1.0, ge=0, le=1, description="Share of the requests that repeat. The others are unique.")
    prompt_name: str | None = Field(None, description="Embeddings: the prompt of all requests, as in `/info`.")
    query_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Embeddings: share of the requests whose `input_type` is `query`. The others are `document`.",
    )
    generation: Generation | None = Field(None, description="Requests to generation servers.")
    names: Mix | None = Field(
        None,
        description="Models and adapters that requests name: `{a: 2, b: 1}` sends twice as many to `a`. `uniform`: all "
        "that the server lists, equally. `zipf:1.2`: the k-th of them has weight 1 / k^1.2. Default: one model, but "
        "`uniform` for a spec with `models`.",
    )
    tasks: dict[str, Task] | None = Field(None, description="Task of each name. Set by the benchmark.")
    workers: int = Field(1, ge=1, le=256, description="Load generator processes.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Set the duration and the loop that follow from stages or the type of the rate."""
        if not isinstance(given, dict):
            return given
        data = dict(given)
        if isinstance(rate := data.get("rate"), str) and (share := _PERCENT.fullmatch(rate.strip())):
            data |= {"rate": None, "capacity_percent": float(share[1])}
            data.setdefault("mode", "open")
        if data.get("users") == "auto":
            data = {key: value for key, value in data.items() if key != "users"} | {"auto_users": True}
        if stages := _mappings(data.get("stages")):
            durations = [stage.get("duration_s") for stage in stages]
            seconds = [duration for duration in durations if isinstance(duration, int | float)]
            if len(seconds) == len(stages):
                data.setdefault("duration_s", sum(seconds))
            data.setdefault("mode", "open" if any(stage.get("rate") is not None for stage in stages) else "closed")
        return data

    @model_validator(mode="after")
    def _check(self) -> Load:
        if self.prompt_name is not None and self.query_share is not None:
            raise ValueError("prompt_name and query_share cannot be combined: keep one of them")
        if self.stages and self.spike:
            raise ValueError("stages and spike cannot be combined: keep one of them")
        if self.capacity_percent is not None and (self.mode == "closed" or self.stages):
            raise ValueError("a rate in percent of the capacity requires an open loop without stages")
        if self.auto_users and (self.stages or (self.mode == "open" and self.capacity_percent is None)):
            raise ValueError("users: auto requires a closed loop without stages")
        wanted, other = ("rate", "users") if self.mode == "open" else ("users", "rate")
        for number, stage in enumerate(self.stages, 1):
            if getattr(stage, wanted) is None or getattr(stage, other) is not None:
                raise ValueError(f"stage {number} of this {self.mode} loop requires {wanted} and cannot have {other}")
        if self.stages:
            if abs(sum(stage.duration_s for stage in self.stages) - self.duration_s) > 1e-6:
                raise ValueError("duration_s must be the sum of the stages: remove it")
            if self.rate is not None:
                raise ValueError("each stage has its own rate: remove rate")
            if not any(getattr(stage, wanted) for stage in self.stages):
                raise ValueError(f"no stage has {wanted} above 0")
        if self.spike and self.spike.at_s + self.spike.duration_s > self.duration_s:
            raise ValueError("the spike must end within duration_s")
        if self.mode == "closed" and self.stages:
            object.__setattr__(self, "users", max(stage.users or 0 for stage in self.stages))
        return self

    def at(self, capacity_rps: float) -> Load:
        """Return the open loop at `capacity_percent` of a measured capacity (requests/s), long enough for a p99."""
        rate = float(f"{capacity_rps * (self.capacity_percent or 100) / 100:.3g}")
        seconds = max(self.duration_s, min(math.ceil(_RESPONSES / rate), _LONGEST_S))
        return self.model_copy(update={"rate": rate, "duration_s": seconds})

    def with_names(self, tasks: dict[str, Task]) -> Load:
        """Return the load with a share for each name, of those that the server has. Raises `UsageError`."""
        mix = self.names
        if isinstance(mix, str):
            exponent = 0.0 if mix == "uniform" else float(mix.partition(":")[2] or 1)
            mix = {name: 1 / number**exponent for number, name in enumerate(tasks, 1)}
        if unknown := [name for name in mix or () if name not in tasks]:
            raise UsageError(
                f"`names`: the server has no model or adapter {unknown[0]!r}", f"it has {', '.join(tasks)}"
            )
        return self.model_copy(update={"names": mix, "tasks": tasks})

    def of_name(self, name: str) -> Load:
        """Return the load of the requests of one name. A rerank request has 16 documents, unless the load sets more."""
        task = (self.tasks or {}).get(name, self.task)
        count = DOCUMENTS if task == "rerank" and self.inputs_per_request == 1 else self.inputs_per_request
        return self.model_copy(update={"task": task, "inputs_per_request": count})

    def as_single_stage(self, **changes: object) -> Load:
        """Return the same requests as a closed loop of `users` with one stage. `changes` replace its keys."""
        return Load.model_validate(self.model_dump(exclude=_SHAPE) | changes)

    @property
    def timeline(self) -> list[Stage]:
        """All stages in order, with names. They cover `duration_s`."""
        if self.stages:
            return [
                stage.model_copy(update={"name": stage.name or f"stage-{number}"})
                for number, stage in enumerate(self.stages, 1)
            ]
        if not self.spike:
            return [self._stage("all", self.duration_s)]
        after = self.duration_s - self.spike.at_s - self.spike.duration_s
        stages = [
            self._stage("before", self.spike.at_s),
            self._stage("spike", self.spike.duration_s, self.spike.times),
        ]
        return stages + ([self._stage("after", after)] if after > 1e-9 else [])

    def _stage(self, name: str, duration_s: float, times: float = 1) -> Stage:
        """Return a stage at `times` the rate or the users of this load."""
        if self.mode == "open":
            rate = None if self.rate is None else self.rate * times
            return Stage(name=name, duration_s=duration_s, rate=rate)
        return Stage(name=name, duration_s=duration_s, users=round(self.users * times))

    @property
    def peak_users(self) -> int:
        """The largest number of users of a closed loop; 0 for an open loop."""
        return max(stage.users or 0 for stage in self.timeline) if self.mode == "closed" else 0


def _mappings(value: object) -> list[Keys]:
    """Return `value` if it is a list of mappings, else an empty list: the validation reports anything else."""
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []
