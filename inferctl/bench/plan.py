"""A plan: which configurations run under which load, read from `benchmarks/plans/*.yaml` or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inferctl import assets
from inferctl.errors import Problem, SpecError, UsageError, did_you_mean
from inferctl.settings import Document, read

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(_Section):
    """One way to serve the model."""

    name: Name
    precision: Precision


class Load(_Section):
    """What is sent at the server."""

    mode: Literal["closed", "open"] = "closed"
    users: int = Field(8, ge=1, le=10_000)
    rate: float | None = Field(None, gt=0, le=100_000)
    arrivals: Literal["poisson", "constant"] = "poisson"
    duration_s: float = Field(15, ge=1, le=86_400)
    warmup_s: float = Field(15, ge=0, le=3600)
    window_s: float = Field(1, ge=0.2, le=60)
    timeout_s: float = Field(30, gt=0, le=3600)
    max_outstanding: int = Field(1000, ge=1, le=100_000)
    inputs_per_request: int = Field(1, ge=1, le=2048)
    inputs: Literal["unique", "as-is"] = "unique"


class Quality(_Section):
    """What the answers are compared on, and what they must reach before a configuration can win."""

    corpus: str = "mixed"
    texts: int = Field(400, ge=20, le=100_000)
    min_cosine_p1: float = Field(0.98, ge=-1, le=1)
    min_recall: float = Field(0.9, ge=0, le=1)


class Plan(_Section):
    """A benchmark, complete: two runs of equal plans on the same machine do the same work."""

    name: Name
    description: str = ""
    configurations: list[Configuration] = Field(min_length=1)
    load: Load = Field(default_factory=lambda: Load.model_validate({}))
    corpus: str = "mixed"
    seed: int = Field(0, ge=0, lt=2**63)
    repeats: int = Field(1, ge=1, le=100)
    quality: Quality | None = Field(default_factory=lambda: Quality.model_validate({}))

    def with_overrides(
        self,
        precisions: list[str] | None = None,
        users: int | None = None,
        rate: float | None = None,
        duration_s: float | None = None,
        repeats: int | None = None,
    ) -> Plan:
        """The plan with what the command line says put in its place; None leaves the plan's own. Raises `UsageError`."""
        data = self.model_dump()
        if precisions:
            data["configurations"] = [{"name": name, "precision": name} for name in dict.fromkeys(precisions)]
        for key, value in {"users": users, "rate": rate, "duration_s": duration_s}.items():
            if value is not None:
                data["load"][key] = value
        if rate is not None:
            data["load"]["mode"] = "open"
        if repeats is not None:
            data["repeats"] = repeats
        try:
            return Plan.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"{where} cannot be {first.get('input')!r}: {_lower(first['msg'])}",
                "`inferctl bench --help` lists the options",
            ) from None

    def runs(self, names: Sequence[str] | None = None) -> list[Run]:
        """Every run in its order, of the plan's configurations or of `names` in their place.

        Repeats alternate in direction (A B B A), so that a slow drift of the machine hits all alike.
        """
        listed = list(names if names is not None else [one.name for one in self.configurations])
        return [
            Run(name, repeat)
            for repeat in range(self.repeats)
            for name in (listed if repeat % 2 == 0 else reversed(listed))
        ]


@dataclass(frozen=True)
class Run:
    """One configuration under load once; `repeat` counts from 0."""

    configuration: str
    repeat: int

    @property
    def name(self) -> str:
        """Name of its folder, as in `bf16-1`."""
        return f"{self.configuration}-{self.repeat + 1}"


def names() -> list[str]:
    """Names of the plans that come with inferctl."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def load(name: str) -> Plan:
    """The plan called `name`, or in the YAML file `name`. Raises `UsageError` or `SpecError` with every mistake and its line."""
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else _folder() / f"{name}.yaml"
    if not path.is_file():
        known = names()
        hint = did_you_mean(name, known) or f"known plans: {', '.join(known)}; or give a YAML file"
        raise UsageError(f"there is no plan {name!r}", hint)
    document = read(path)
    try:
        plan = Plan.model_validate(document.data)
    except ValidationError as error:
        problems = [_problem(dict(e), document) for e in error.errors()]
        raise SpecError(document.file, sorted(problems, key=lambda problem: problem.line or 0)) from None
    if problems := _contradictions(plan, document):
        raise SpecError(document.file, problems)
    return plan


def _folder() -> Path:
    return assets.root() / "benchmarks" / "plans"


def _contradictions(plan: Plan, document: Document) -> list[Problem]:
    problems = []
    if plan.load.mode == "open" and plan.load.rate is None:
        problems.append(
            Problem("load.rate", "an open loop needs load.rate", document.line(["load"]), "add `rate: 50` (requests/s)")
        )
    seen: set[str] = set()
    for index, configuration in enumerate(plan.configurations):
        if configuration.name in seen:
            line = document.line(["configurations", index])
            problems.append(
                Problem(
                    "configurations", f"the name {configuration.name!r} is used twice", line, "give each its own name"
                )
            )
        seen.add(configuration.name)
    return problems


def _problem(error: dict[str, Any], document: Document) -> Problem:
    location, value = error["loc"], error.get("input")
    path = ".".join(str(part) for part in location)
    line = document.line(location)
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1])
        return Problem(
            path,
            f"unknown key {location[-1]!r}",
            line,
            did_you_mean(str(location[-1]), known) or f"known: {', '.join(known)}",
        )
    if error["type"] == "missing":
        return Problem(path, f"{path} is missing", line, "docs/bench.md explains every key")
    return Problem(path, f"{path}: {_lower(error['msg'])}, got {value!r}", line)


def _fields(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"load": Load, "quality": Quality, "configurations": Configuration}
    section = sections.get(str(location[0]), Plan) if location else Plan
    return list(section.model_fields)


def _lower(message: str) -> str:
    return message.replace("Input should be", "must be").replace("Value error, ", "")
