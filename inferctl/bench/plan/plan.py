"""A plan: which configurations run under which load, read from `benchmarks/plans/*.yaml` or from a file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from inferctl import assets
from inferctl.bench.plan.shape import Load, Name, Section, Spike, Stage
from inferctl.document import Document, read
from inferctl.errors import Problem, SpecError, UsageError, did_you_mean, shown

__all__ = [
    "Configuration",
    "Load",
    "Matrix",
    "Plan",
    "Quality",
    "Run",
    "Search",
    "Spike",
    "Stage",
    "load",
    "names",
    "vary",
]

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]


class Configuration(Section):
    """One way to serve the model, and what differs from the plan when it is measured: texts, and keys of the load."""

    name: Name
    precision: Precision
    max_batch_tokens: int | None = Field(None, ge=64, le=1_048_576)
    corpus: str | None = None
    load: dict[str, Any] | None = None


class Quality(Section):
    """What the answers are compared on, and what they must reach before a configuration can win."""

    corpus: str = "mixed"
    texts: int = Field(400, ge=20, le=100_000)
    min_cosine_p1: float = Field(0.98, ge=-1, le=1)
    min_recall: float = Field(0.9, ge=0, le=1)


class Matrix(Section):
    """Every value of each axis with every value of the others. `load` gives each load a name and the keys in which it differs."""

    precision: list[Precision] = Field(min_length=1)
    max_batch_tokens: list[Annotated[int, Field(ge=64, le=1_048_576)]] = Field(default_factory=list)
    corpus: list[str] = Field(default_factory=list)
    load: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    hardware: list[str] = Field(default_factory=list)

    def configurations(self) -> list[Configuration]:
        """One a combination, named after the axes that have more than one value."""
        return vary(
            [Configuration.model_validate({"name": one, "precision": one}) for one in dict.fromkeys(self.precision)],
            self.max_batch_tokens,
            self.corpus,
            self.load,
        )


class Search(Section):
    """How the highest rate that holds the SLO is looked for; `inferctl/bench/measure/search.py` says what is done with it."""

    slo_p99_ms: float | None = Field(None, gt=0, le=3_600_000)
    resolution: float = Field(0.05, gt=0, le=1)
    probe_s: float = Field(8, ge=1, le=3600)
    max_probe_s: float = Field(60, ge=1, le=86_400)
    max_probes: int = Field(24, ge=3, le=200)
    start_rate: float | None = Field(None, gt=0, le=100_000)
    max_rate: float = Field(100_000, gt=0, le=100_000)
    budget_s: float | None = Field(None, ge=1, le=604_800)


class Plan(Section):
    """A benchmark, complete: two runs of equal plans on the same machine do the same work.

    A `matrix` is written out into `configurations` when it is read, so that whoever has a plan has every configuration.
    """

    name: Name
    description: str = ""
    configurations: list[Configuration] = Field(default_factory=list)
    matrix: Matrix | None = None
    hardware: list[str] = Field(default_factory=list)
    search: Search | None = None
    neighbours: int = Field(0, ge=0, le=64)
    load: Load = Field(default_factory=lambda: Load.model_validate({}))
    corpus: str = "mixed"
    seed: int = Field(0, ge=0, lt=2**63)
    repeats: int = Field(1, ge=1, le=100)
    error_budget_percent: float = Field(0.1, ge=0, le=100)
    quality: Quality | None = Field(default_factory=lambda: Quality.model_validate({}))

    @model_validator(mode="after")
    def _written_out(self) -> Plan:
        if bool(self.configurations) == bool(self.matrix):
            raise ValueError("a plan has either configurations or a matrix")
        if self.search and self.repeats > 1:
            raise ValueError(
                "a search measures each configuration once, it repeats what decides by itself: leave repeats out"
            )
        if self.neighbours and self.load.capacity_percent:
            raise ValueError("neighbours need a rate in requests/s: a share of the capacity is measured without them")
        made = self
        if self.matrix:
            hardware = list(dict.fromkeys([*self.hardware, *self.matrix.hardware]))
            changes = {"configurations": self.matrix.configurations(), "matrix": None, "hardware": hardware}
            made = self.model_copy(update=changes)
        for one in made.configurations:
            try:
                made.load_with(one.load)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(
                    f"the load of {one.name}: {'.'.join(map(str, first['loc']))}: {_lower(first['msg'])}"
                ) from None
        return made

    def load_with(self, changes: Mapping[str, Any] | None) -> Load:
        """The plan's load with `changes`; a rate makes it open and users make it closed, unless they say a mode too."""
        if not changes:
            return self.load
        implied = {"mode": "open"} if "rate" in changes else {"mode": "closed"} if "users" in changes else {}
        own = self.load.model_dump(exclude_unset=True)
        if not {"rate", "users", "stages", "trace"}.isdisjoint(changes):
            own.pop("auto_users", None)
        if "rate" in changes:
            own.pop("capacity_percent", None)
        return Load.model_validate({**own, **implied, **changes})

    def seed_of(self, repeat: int) -> int:
        """Return the seed of a repeat: the plan's seed for the first one (0), a hash of seed and repeat for the others.

        All configurations share the seed of a repeat, so that their runs are pairs. Different repeats have different
        schedules: if all had one, pooled runs would show the luck of that schedule only.
        """
        if not repeat:
            return self.seed
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{repeat}".encode()).digest()[:8], "big") >> 1

    def with_overrides(
        self,
        precisions: Sequence[str] | None = None,
        users: int | None = None,
        rate: float | None = None,
        duration_s: float | None = None,
        repeats: int | None = None,
        **more: Any,
    ) -> Plan:
        """The plan with what the command line says put in its place; None leaves the plan's own. Raises `UsageError`.

        `more`: `load` (dict of further load keys), `batch_tokens` and `corpora` (lists, each multiplies the configurations),
        `hardware` (list), `search` (dict of search keys; an empty one asks for a search), `neighbours` (how many),
        `error_budget_percent`.
        """
        data = self.model_dump(exclude_unset=True) | {
            "configurations": [one.model_dump() for one in self.configurations]
        }
        data.pop("matrix", None)
        data["load"] = self.load.model_dump(exclude_unset=True)
        given = {"users": users, "rate": rate, "duration_s": duration_s, **(more.get("load") or {})}
        data["load"] |= {key: value for key, value in given.items() if value is not None}
        if users is not None or rate is not None:
            data["load"].pop("auto_users", None)
        if rate is not None:
            data["load"]["mode"] = "open"
            data["load"].pop("capacity_percent", None)
        if repeats is not None:
            data["repeats"] = repeats
        if (budget := more.get("error_budget_percent")) is not None:
            data["error_budget_percent"] = budget
        if (neighbours := more.get("neighbours")) is not None:
            data["neighbours"] = neighbours
        if hardware := more.get("hardware"):
            data["hardware"] = list(dict.fromkeys([*self.hardware, *hardware]))
        if (search := more.get("search")) is not None:
            own = self.search.model_dump(exclude_unset=True) if self.search else {}
            data["search"] = own | {key: value for key, value in search.items() if value is not None}
            data["repeats"] = repeats or 1
        elif self.search and more.get("slo_p99_ms"):
            data["search"] = {**data["search"], "slo_p99_ms": more["slo_p99_ms"]}
        if (budget_s := more.get("budget_s")) is not None:
            if not data.get("search"):
                raise UsageError("--budget is for a search", "add `--search --slo MS`, or choose a plan with a search")
            data["search"] = {**data["search"], "budget_s": budget_s}
        try:
            if precisions:
                data["configurations"] = [{"name": name, "precision": name} for name in dict.fromkeys(precisions)]
            listed = [Configuration.model_validate(one) for one in data["configurations"]]
            corpora = list(dict.fromkeys(more.get("corpora") or []))
            if len(corpora) == 1:
                data["corpus"] = corpora.pop()
                listed = [one.model_copy(update={"corpus": None}) for one in listed]
            data["configurations"] = vary(listed, more.get("batch_tokens") or [], corpora)
            return Plan.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"{where} cannot be {shown(first.get('input'))}: {_lower(first['msg'])}"
                if where
                else _lower(first["msg"]),
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


def vary(
    configurations: Sequence[Configuration],
    batch_tokens: Sequence[int] = (),
    corpora: Sequence[str] = (),
    loads: Mapping[str, dict[str, Any]] | None = None,
) -> list[Configuration]:
    """Each configuration with each batch budget, corpus and load; an axis with one value or more than one replaces the configurations' own.

    Only an axis with several values becomes part of the names.
    """
    axes: list[list[tuple[str, dict[str, Any]]]] = [
        [(str(value), {"max_batch_tokens": value}) for value in dict.fromkeys(batch_tokens)],
        [(Path(value).stem, {"corpus": value}) for value in dict.fromkeys(corpora)],
        [(name, {"load": changes}) for name, changes in (loads or {}).items()],
    ]
    made = []
    for one, *choices in itertools.product(configurations, *(axis or [("", {})] for axis in axes)):
        parts = [one.name, *(label for (label, _), axis in zip(choices, axes, strict=True) if len(axis) > 1)]
        changes = {key: value for _, values in choices for key, value in values.items()}
        made.append(Configuration.model_validate({**one.model_dump(), **changes, "name": "-".join(parts)}))
    return made


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
    document = read(path, "docs/bench.md explains every key")
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
    given = plan.load.rate or plan.load.capacity_percent or plan.load.stages or plan.load.trace
    if plan.load.mode == "open" and not given:
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
    if not location:
        return Problem("", _lower(error["msg"]), None, "docs/bench.md explains every key")
    if error["type"] == "missing":
        return Problem(path, f"{path} is missing", line, "docs/bench.md explains every key")
    return Problem(path, f"{path}: {_lower(error['msg'])}, got {shown(value)}", line)


def _fields(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "load": Load,
        "quality": Quality,
        "configurations": Configuration,
        "matrix": Matrix,
        "search": Search,
    }
    within: dict[str, type[BaseModel]] = {"stages": Stage, "spike": Spike}
    section = sections.get(str(location[0]), Plan) if location else Plan
    section = within.get(str(location[1]), section) if len(location) > 1 else section
    return list(section.model_fields)


def _lower(message: str) -> str:
    return message.replace("Input should be", "must be").replace("Value error, ", "")
