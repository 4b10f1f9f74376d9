"""The load of a plan: a closed or open loop, in stages, with a spike, or replayed from a trace."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inferctl.bench.plan import traces

# As in `rate: 60%`.
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
# A run at a share of the capacity lasts long enough for a p99, and no longer than this unless the plan says so.
_RESPONSES, _LONGEST_S = 1.15 * 368, 60.0

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]


class Section(BaseModel):
    """A mapping of a plan: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Stage(Section):
    """A stretch of a load with a rate (open loop, requests/s) or a number of users (closed loop) of its own."""

    duration_s: float = Field(gt=0, le=86_400)
    rate: Annotated[float, Field(ge=0, le=100_000)] | None = None
    users: Annotated[int, Field(ge=0, le=10_000)] | None = None
    name: Name | None = None


class Spike(Section):
    """A sudden burst: from `at_s` on, for `duration_s`, `times` the rate (open loop) or the users (closed loop)."""

    at_s: float = Field(gt=0, le=86_400)
    duration_s: float = Field(gt=0, le=86_400)
    times: float = Field(gt=0, le=1000)


class Load(Section):
    """What is sent at the server. `timeline` is its course, whichever way it was given.

    `rate: 60%` becomes `capacity_percent`; `at` gives the load its rate once the capacity was measured.
    `users: auto` becomes `auto_users`; `users` then has the number once it is found.
    """

    mode: Literal["closed", "open"] = "closed"
    users: int = Field(8, ge=1, le=10_000)
    auto_users: bool = False
    rate: float | None = Field(None, gt=0, le=100_000)
    capacity_percent: float | None = Field(None, gt=0, le=100)
    capacity_s: float = Field(5, ge=1, le=3600)
    arrivals: Literal["poisson", "constant"] = "poisson"
    stages: list[Stage] = Field(default_factory=list, max_length=1000)
    spike: Spike | None = None
    trace: str | None = None
    duration_s: float = Field(15, ge=1, le=86_400)
    warmup_s: float = Field(15, ge=0, le=3600)
    window_s: float = Field(1, ge=0.2, le=60)
    timeout_s: float = Field(30, gt=0, le=3600)
    max_outstanding: int = Field(1000, ge=1, le=100_000)
    inputs_per_request: int = Field(1, ge=1, le=2048)
    inputs: Literal["unique", "as-is", "zipf"] = "unique"
    zipf_s: float = Field(1.0, ge=0, le=10)
    zipf_share: float = Field(1.0, ge=0, le=1)
    workers: int = Field(1, ge=1, le=256)
    remote_workers: int = Field(0, ge=0, le=256)
    master_port: int = Field(5557, ge=1, le=65_535)

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, given: Any) -> Any:
        """Stages, a trace and their rates say how long a load lasts and which loop it is."""
        if not isinstance(given, dict):
            return given
        data = dict(given)
        if isinstance(rate := data.get("rate"), str) and (share := _SHARE.fullmatch(rate.strip())):
            data |= {"rate": None, "capacity_percent": float(share[1])}
            data.setdefault("mode", "open")
        if data.get("users") == "auto":
            data = {key: value for key, value in data.items() if key != "users"} | {"auto_users": True}
        if stages := _list_of_dicts(data.get("stages")):
            seconds = [one["duration_s"] for one in stages if isinstance(one.get("duration_s"), int | float)]
            if len(seconds) == len(stages):
                data.setdefault("duration_s", sum(seconds))
            data.setdefault("mode", "open" if any(one.get("rate") is not None for one in stages) else "closed")
        if isinstance(data.get("trace"), str):
            data.setdefault("mode", "open")
            if "duration_s" not in data:
                data["duration_s"] = max(1.0, math.ceil(traces.read(data["trace"])[-1].at_s + 1e-9))
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Load:
        if sum(map(bool, (self.stages, self.spike, self.trace))) > 1:
            raise ValueError("a load has one of stages, spike and trace")
        if self.trace and self.mode == "closed":
            raise ValueError("a trace is an open loop")
        if self.capacity_percent is not None and (self.mode == "closed" or self.stages or self.trace):
            raise ValueError("a rate in percent of the capacity is for an open loop without stages and trace")
        if self.auto_users and (self.stages or (self.mode == "open" and self.capacity_percent is None)):
            raise ValueError("users: auto is for a closed loop without stages")
        wanted, other = ("rate", "users") if self.mode == "open" else ("users", "rate")
        for number, stage in enumerate(self.stages, 1):
            if getattr(stage, wanted) is None or getattr(stage, other) is not None:
                raise ValueError(f"stage {number} of this {self.mode} loop needs {wanted}, and no {other}")
        if self.stages:
            if abs(sum(stage.duration_s for stage in self.stages) - self.duration_s) > 1e-6:
                raise ValueError("duration_s is the sum of the stages: leave it out")
            if self.rate is not None:
                raise ValueError("the stages have rates of their own: leave rate out")
            if not any(getattr(stage, wanted) for stage in self.stages):
                raise ValueError("the stages send nothing")
        if self.spike and self.spike.at_s + self.spike.duration_s > self.duration_s:
            raise ValueError("the spike ends after the load")
        if self.mode == "closed" and self.stages:
            object.__setattr__(self, "users", max(stage.users or 0 for stage in self.stages))
        return self

    def at(self, capacity_rps: float) -> Load:
        """Return the open loop at `capacity_percent` of a measured capacity, long enough for a p99 (60 s at most)."""
        rate = float(f"{capacity_rps * (self.capacity_percent or 100) / 100:.3g}")
        seconds = max(self.duration_s, min(math.ceil(_RESPONSES / rate), _LONGEST_S))
        return self.model_copy(update={"rate": rate, "duration_s": seconds})

    @property
    def timeline(self) -> list[Stage]:
        """The load as stages with names, in order, over `duration_s`. A trace is one stage without a rate."""
        if self.stages:
            return [
                stage.model_copy(update={"name": stage.name or f"stage-{number}"})
                for number, stage in enumerate(self.stages, 1)
            ]
        level: dict[str, Any] = {"rate": self.rate} if self.mode == "open" else {"users": self.users}
        if self.trace:
            return [Stage(name="trace", duration_s=self.duration_s)]
        if not self.spike:
            return [Stage(name="all", duration_s=self.duration_s, **level)]
        peak = {
            key: value
            if value is None
            else value * self.spike.times
            if key == "rate"
            else round(value * self.spike.times)
            for key, value in level.items()
        }
        after = self.duration_s - self.spike.at_s - self.spike.duration_s
        parts = [
            Stage(name="before", duration_s=self.spike.at_s, **level),
            Stage(name="spike", duration_s=self.spike.duration_s, **peak),
        ]
        return parts + ([Stage(name="after", duration_s=after, **level)] if after > 1e-9 else [])

    @property
    def peak_users(self) -> int:
        """Most clients of a closed loop at any time."""
        return max(stage.users or 0 for stage in self.timeline) if self.mode == "closed" else 0


def _list_of_dicts(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else []
