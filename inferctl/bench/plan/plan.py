"""Benchmark plans: which configurations run under which load. Read from `benchmarks/plans/*.yaml` or from a file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from inferctl import assets
from inferctl.bench.plan.shape import Generation, Keys, Load, Name, Section, Spike, Stage
from inferctl.document import Document, read
from inferctl.errors import Problem, SpecError, UsageError, did_you_mean, shown
from inferctl.spec import Task

__all__ = [
    "Configuration",
    "Generation",
    "Load",
    "Matrix",
    "Overrides",
    "Plan",
    "Quality",
    "Run",
    "Search",
    "Spike",
    "Stage",
    "combine",
    "load",
    "names",
]

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"]
# Documents of a rerank request.
DOCUMENTS = 16
# The limit in seconds of a request to a generation server, if the plan sets none.
_GENERATION_TIMEOUT_S = 300.0


class Configuration(Section):
    """One way to serve the model, with the corpus and the keys of the load in which it differs from the plan.

    `checkpoint` is the folder of a prepared checkpoint of the same model, for generation. A plan in a file names it
    relative to the file.
    """

    name: Name
    precision: Precision
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    max_batch_tokens: int | None = Field(None, ge=64, le=1_048_576)
    corpus: str | None = None
    load: Keys | None = None


class Quality(Section):
    """The texts on which a configuration is compared with fp32, and the limits with which it can win.

    Cosine and recall are those of embeddings, Kendall's tau and the score difference those of rerank scores. The limit
    of the score difference is a share of the range of the fp32 scores. For generation, `tokens` is the number of tokens
    of which the log-probabilities are compared, `max_kl` the largest mean KL divergence (nats), and `min_top_1` the
    smallest share of equal most likely tokens.
    """

    corpus: str = "mixed"
    texts: int = Field(400, ge=20, le=100_000)
    min_cosine_p1: float = Field(0.98, ge=-1, le=1)
    min_recall: float = Field(0.9, ge=0, le=1)
    min_kendall: float = Field(0.9, ge=-1, le=1)
    max_score_difference: float = Field(0.1, ge=0, le=1)
    tokens: int = Field(4096, ge=256, le=1_000_000)
    max_kl: float = Field(0.1, ge=0, le=100)
    min_top_1: float = Field(0.8, ge=0, le=1)


class Matrix(Section):
    """All combinations of the values of several axes.

    `load` maps a name to the keys in which that load differs from the plan's.
    """

    precision: list[Precision] = Field(min_length=1)
    max_batch_tokens: list[Annotated[int, Field(ge=64, le=1_048_576)]] = Field(default_factory=list)
    corpus: list[str] = Field(default_factory=list)
    load: dict[Name, Keys] = Field(default_factory=dict)
    hardware: list[str] = Field(default_factory=list)

    def configurations(self) -> list[Configuration]:
        """Return one configuration per combination, named after the axes that have more than one value."""
        return combine(
            [Configuration.model_validate({"name": name, "precision": name}) for name in dict.fromkeys(self.precision)],
            self.max_batch_tokens,
            self.corpus,
            self.load,
        )


class Search(Section):
    """Settings of the search for the highest rate within the SLO (`inferctl/bench/measure/search.py`)."""

    slo_p99_ms: float | None = Field(None, gt=0, le=3_600_000)
    resolution: float = Field(0.05, gt=0, le=1)
    probe_s: float = Field(8, ge=1, le=3600)
    max_probe_s: float = Field(60, ge=1, le=86_400)
    max_probes: int = Field(24, ge=3, le=200)
    start_rate: float | None = Field(None, gt=0, le=100_000)
    max_rate: float = Field(100_000, gt=0, le=100_000)
    budget_s: float | None = Field(None, ge=1, le=604_800)

    def required_slo_ms(self, default_ms: float | None) -> float:
        """Return the p99 SLO: the search's own, else `default_ms`. Raises `UsageError` if there is none."""
        slo_ms = self.slo_p99_ms or default_ms
        if not slo_ms:
            raise UsageError(
                "a search requires an SLO",
                "pass `--slo 100` (ms; for generation, also `--slo-ttft 500` or `--slo-itl 50`), or set "
                "`search.slo_p99_ms` in the plan or `slo` in the spec",
            )
        return slo_ms


class GenerationPlan(Section):
    """The keys of a plan that have other values for generation. `load` has the keys of the load that differ."""

    configurations: list[Configuration] | None = None
    load: Keys = Field(default_factory=dict)
    repeats: int | None = Field(None, ge=1, le=100)


class Plan(Section):
    """Everything that defines a benchmark. Two runs of equal plans on the same machine do the same work.

    Validation replaces a `matrix` by its `configurations`, so a loaded plan lists every configuration. It may have
    none: they then come from the command line.
    """

    name: Name
    description: str = ""
    configurations: list[Configuration] = Field(default_factory=list)
    matrix: Matrix | None = None
    hardware: list[str] = Field(default_factory=list)
    search: Search | None = None
    neighbours: int = Field(0, ge=0, le=64)
    load: Load = Field(default_factory=lambda: Load.model_validate({}))
    generate: GenerationPlan | None = None
    corpus: str = "mixed"
    seed: int = Field(0, ge=0, lt=2**63)
    repeats: int = Field(1, ge=1, le=100)
    error_budget_percent: float = Field(0.1, ge=0, le=100)
    quality: Quality | None = Field(default_factory=lambda: Quality.model_validate({}))

    @model_validator(mode="after")
    def _expand_matrix(self) -> Plan:
        if self.configurations and self.matrix:
            raise ValueError("a plan has either configurations or a matrix, not both")
        if self.search and self.repeats > 1:
            raise ValueError(
                "a search measures each configuration once and repeats uncertain probes itself: remove repeats"
            )
        if self.neighbours and self.load.capacity_percent:
            raise ValueError(
                "neighbours need a rate in requests/s: the capacity for a rate in percent is measured without them"
            )
        expanded = self
        if self.matrix:
            hardware = list(dict.fromkeys([*self.hardware, *self.matrix.hardware]))
            update = {"configurations": self.matrix.configurations(), "matrix": None, "hardware": hardware}
            expanded = self.model_copy(update=update)
        loads = [(configuration.name, configuration.load) for configuration in expanded.configurations]
        loads += [("generate", self.generate.load)] if self.generate else []
        for name, changes in loads:
            try:
                expanded.load_with(changes)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(
                    f"the load of {name}: {'.'.join(map(str, first['loc']))}: {_message(first['msg'])}"
                ) from None
        return expanded

    def load_with(self, changes: Mapping[str, object] | None) -> Load:
        """Return the plan's load with `changes`.

        Without a `mode` in `changes`, a rate makes the loop open and a number of users makes it closed.
        """
        if not changes:
            return self.load
        implied = {"mode": "open"} if "rate" in changes else {"mode": "closed"} if "users" in changes else {}
        own = self.load.model_dump(exclude_unset=True)
        if not {"rate", "users", "stages", "trace"}.isdisjoint(changes):
            own.pop("auto_users", None)
        if "rate" in changes:
            own.pop("capacity_percent", None)
        return Load.model_validate({**own, **implied, **changes})

    def for_task(self, task: Task) -> Plan:
        """Return the plan for models of `task`. Raises `UsageError` if it is not for that task.

        A rerank request has 16 documents, unless the plan sets `inputs_per_request`.
        """
        given = self.load.model_fields_set
        if "task" in given and self.load.task != task:
            raise UsageError(
                f"the plan {self.name} is for the task {self.load.task}, but the task of the model is {task}",
                "remove `load.task` from the plan",
            )
        traces = (self.load.trace, *((each.load or {}).get("trace") for each in self.configurations))
        if task != "embed" and any(traces):
            raise UsageError(
                f"a trace has inputs for embeddings, but the task of the model is {task}", "use another load"
            )
        if task == "generate":
            return self._for_generation()
        if found := next((each.name for each in self.configurations if each.checkpoint), None):
            raise UsageError(
                f"`checkpoint` of {found!r} is for generation, but the task of the model is {task}",
                "remove it from the plan",
            )
        if self.load.generation:
            raise UsageError(
                f"`load.generation` is for generation, but the task of the model is {task}",
                "remove `--lengths`, `--slo-ttft`, `--slo-itl` and `load.generation`",
            )
        if task == self.load.task:
            return self
        count = self.load.inputs_per_request if "inputs_per_request" in given else DOCUMENTS
        load = self.load.model_copy(update={"task": task, "inputs_per_request": count})
        return self.model_copy(update={"load": load})

    def _for_generation(self) -> Plan:
        """Return the plan with its keys for generation."""
        own = self.generate or GenerationPlan.model_validate({})
        requests = self.load.generation.model_dump(exclude_unset=True) if self.load.generation else {}
        requests = _merged(
            requests, Generation.model_validate(own.load.get("generation") or {}).model_dump(exclude_unset=True)
        )
        load = self.load_with({**own.load, "generation": requests} if own.load else {})
        if load.inputs_per_request != 1:
            raise UsageError("a generation request has one prompt", "remove `load.inputs_per_request`")
        if load.auto_users:
            raise UsageError("`users: auto` is not available for generation", "set the number with `--users`")
        update: Keys = {"task": "generate", "generation": Generation.model_validate(requests)}
        if "timeout_s" not in load.model_fields_set:
            update["timeout_s"] = _GENERATION_TIMEOUT_S
        # A second call, as for a resumed benchmark, must change nothing.
        changes: Keys = {"load": load.model_copy(update=update), "generate": None}
        if own.configurations is not None:
            changes["configurations"] = own.configurations
        if own.repeats is not None:
            changes["repeats"] = own.repeats
        return self.model_copy(update=changes)

    def with_bounds(self, ttft_ms: float | None, itl_ms: float | None) -> Plan:
        """Return the plan with these bounds of a good response in ms, unless it or the command line sets them."""
        given = {key: value for key, value in (("ttft_ms", ttft_ms), ("itl_ms", itl_ms)) if value is not None}
        if not given:
            return self
        own = self.load.generation.model_dump(exclude_unset=True) if self.load.generation else {}
        generation = Generation.model_validate({**given, **{key: value for key, value in own.items() if value}})
        return self.model_copy(update={"load": self.load.model_copy(update={"generation": generation})})

    def with_checkpoints_in(self, folder: Path) -> Plan:
        """Return the plan with absolute paths of its checkpoints, which are relative to `folder`."""

        def absolute(configurations: list[Configuration]) -> list[Configuration]:
            return [
                each.model_copy(update={"checkpoint": str((folder / Path(each.checkpoint).expanduser()).resolve())})
                if each.checkpoint
                else each
                for each in configurations
            ]

        changes: Keys = {"configurations": absolute(self.configurations)} if self.configurations else {}
        if self.generate and self.generate.configurations:
            own = {"configurations": absolute(self.generate.configurations)}
            changes["generate"] = self.generate.model_copy(update=own)
        return self.model_copy(update=changes)

    def seed_of(self, repeat: int) -> int:
        """Return the seed of a repeat: the plan's seed for the first one (0), a hash of seed and repeat for the others.

        All configurations share the seed of a repeat, so that their runs are pairs. Different repeats have different
        schedules: with a common schedule, pooled runs would show the variation of that schedule only.
        """
        if not repeat:
            return self.seed
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{repeat}".encode()).digest()[:8], "big") >> 1

    def with_overrides(
        self,
        precisions: Sequence[str] | None = None,
        **overrides: Unpack[Overrides],
    ) -> Plan:
        """Return the plan with the options of the command line. None keeps the plan's value. Raises `UsageError`."""
        users, rate, repeats = overrides.get("users"), overrides.get("rate"), overrides.get("repeats")
        data: dict[str, Any] = self.model_dump(exclude_unset=True)
        data["configurations"] = [configuration.model_dump() for configuration in self.configurations]
        data.pop("matrix", None)
        data["load"] = self.load.model_dump(exclude_unset=True)
        given: Keys = {"users": users, "rate": rate, "duration_s": overrides.get("duration_s")}
        given |= overrides.get("load") or {}
        data["load"] |= {key: value for key, value in given.items() if value is not None}
        if users is not None or rate is not None:
            data["load"].pop("auto_users", None)
        if rate is not None:
            data["load"]["mode"] = "open"
            data["load"].pop("capacity_percent", None)
        if repeats is not None:
            data["repeats"] = repeats
        requests = {key: value for key, value in (overrides.get("generation") or {}).items() if value is not None}
        if requests:
            data["load"]["generation"] = _merged(data["load"].get("generation") or {}, requests)
        if data.get("generate"):
            data["generate"] = self._overridden_for_generation(data["load"], bool(precisions), overrides)
        if (budget := overrides.get("error_budget_percent")) is not None:
            data["error_budget_percent"] = budget
        if (neighbours := overrides.get("neighbours")) is not None:
            data["neighbours"] = neighbours
        if hardware := overrides.get("hardware"):
            data["hardware"] = list(dict.fromkeys([*self.hardware, *hardware]))
        if (search := overrides.get("search")) is not None:
            own = self.search.model_dump(exclude_unset=True) if self.search else {}
            data["search"] = own | {key: value for key, value in search.items() if value is not None}
            data["repeats"] = repeats or 1
        elif self.search and overrides.get("slo_p99_ms"):
            data["search"] = {**data["search"], "slo_p99_ms": overrides["slo_p99_ms"]}
        if (budget_s := overrides.get("budget_s")) is not None:
            if data.get("search") is None:  # an empty one has its bounds in the load
                raise UsageError(
                    "`--budget` requires a search", "add `--search --slo MS`, or choose a plan with a search"
                )
            data["search"] = {**data["search"], "budget_s": budget_s}
        try:
            if precisions:
                data["configurations"] = [{"name": name, "precision": name} for name in dict.fromkeys(precisions)]
            configurations = [Configuration.model_validate(keys) for keys in data["configurations"]]
            corpora = list(dict.fromkeys(overrides.get("corpora") or []))
            if len(corpora) == 1:
                data["corpus"] = corpora.pop()
                configurations = [each.model_copy(update={"corpus": None}) for each in configurations]
            data["configurations"] = combine(configurations, overrides.get("batch_tokens") or [], corpora)
            return Plan.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"{where} cannot be {shown(first.get('input'))}: {_message(first['msg'])}"
                if where
                else _message(first["msg"]),
                "`inferctl bench --help` lists the options",
            ) from None

    def _overridden_for_generation(self, load: Mapping[str, Any], precisions: bool, overrides: Overrides) -> Keys:
        """Return the `generate` key without what the options of the command line replace."""
        assert self.generate  # the caller checks it
        data = self.generate.model_dump(exclude_unset=True)
        own = dict(data.get("load") or {})
        given = {key for key in ("users", "rate", "duration_s") if overrides.get(key) is not None}
        given |= {key for key, value in (overrides.get("load") or {}).items() if value is not None}
        if given & {"users", "rate"}:
            given |= {"users", "rate", "mode"}
        own = {key: value for key, value in own.items() if key not in given}
        requests = {key: value for key, value in (overrides.get("generation") or {}).items() if value is not None}
        if requests or own.get("generation"):
            own["generation"] = _merged(own.get("generation") or load.get("generation") or {}, requests)
        data["load"] = own
        if precisions:
            data.pop("configurations", None)
        if overrides.get("repeats") is not None or data.get("repeats") is None:
            data.pop("repeats", None)
        return data

    def runs(self, names: Sequence[str] | None = None) -> list[Run]:
        """Return every run in order. `names` replaces the names of the plan's configurations.

        Repeats alternate in direction (A B B A), so that a slow drift of the machine affects all configurations
        equally.
        """
        ordered = list(names if names is not None else [each.name for each in self.configurations])
        return [
            Run(name, repeat)
            for repeat in range(self.repeats)
            for name in (ordered if repeat % 2 == 0 else reversed(ordered))
        ]


class Overrides(TypedDict, total=False):
    """Options of the command line that replace values of a plan. None and an absent key keep the plan's value."""

    users: int | None
    rate: float | None
    duration_s: float | None
    repeats: int | None
    load: Mapping[str, object] | None  # further keys of the load
    generation: Mapping[str, object] | None  # keys of `load.generation`
    batch_tokens: Sequence[int] | None  # each value multiplies the configurations
    corpora: Sequence[str] | None  # two or more multiply the configurations
    hardware: Sequence[str] | None  # added to the plan's
    search: Mapping[str, object] | None  # keys of the search; an empty mapping requests a search with defaults
    slo_p99_ms: float | None  # of a search that the plan has
    budget_s: float | None
    neighbours: int | None
    error_budget_percent: float | None


@dataclass(frozen=True)
class Run:
    """One measurement of one configuration; `repeat` counts from 0."""

    configuration: str
    repeat: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder, as in `bf16-1`."""
        return f"{self.configuration}-{self.repeat + 1}"


def _merged(own: Mapping[str, object], given: Mapping[str, object]) -> Keys:
    """Return the keys of `load.generation` with those of the command line: one way to give lengths replaces another."""
    lengths = ("input_tokens", "output_tokens", "lengths", "max_request_tokens")
    if not given.keys().isdisjoint(lengths):
        own = {key: value for key, value in own.items() if key not in lengths[: 4 if "input_tokens" in given else 3]}
    return {**own, **given}


def combine(
    configurations: Sequence[Configuration],
    batch_tokens: Sequence[int] = (),
    corpora: Sequence[str] = (),
    loads: Mapping[str, Keys] | None = None,
) -> list[Configuration]:
    """Return each configuration with each token budget of a batch, each corpus and each load.

    The values of an axis replace the configuration's own value. Only axes with several values become part of the names.
    """
    axes: list[list[tuple[str, Keys]]] = [
        [(str(value), {"max_batch_tokens": value}) for value in dict.fromkeys(batch_tokens)],
        [(Path(value).stem, {"corpus": value}) for value in dict.fromkeys(corpora)],
        [(name, {"load": changes}) for name, changes in (loads or {}).items()],
    ]
    no_change: list[tuple[str, Keys]] = [("", {})]
    choices_of_axes = list(itertools.product(*(axis or no_change for axis in axes)))
    combined = []
    for configuration, choices in itertools.product(configurations, choices_of_axes):
        parts = [configuration.name, *(label for (label, _), axis in zip(choices, axes, strict=True) if len(axis) > 1)]
        changes = {key: value for _, values in choices for key, value in values.items()}
        keys = {**configuration.model_dump(), **changes, "name": "-".join(parts)}
        combined.append(Configuration.model_validate(keys))
    return combined


def names() -> list[str]:
    """Return the names of the plans that come with inferctl."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def load(name: str) -> Plan:
    """Return the plan called `name`, or the plan in the YAML file `name`.

    Raises `UsageError` if there is no such plan, and `SpecError` with every error and its line.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else _folder() / f"{name}.yaml"
    if not path.is_file():
        known = names()
        hint = did_you_mean(name, known) or f"known plans: {', '.join(known)}; or pass the path of a YAML file"
        raise UsageError(f"plan {name!r} not found", hint)
    document = read(path, "docs/bench.md explains every key")
    try:
        plan = Plan.model_validate(document.data).with_checkpoints_in(path.parent.absolute())
    except ValidationError as error:
        problems = [_problem(details, document) for details in error.errors()]
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
            Problem(
                "load.rate", "an open loop requires load.rate", document.line(["load"]), "add `rate: 50` (requests/s)"
            )
        )
    seen: set[str] = set()
    for index, configuration in enumerate(plan.configurations):
        if configuration.name in seen:
            line = document.line(["configurations", index])
            problems.append(
                Problem(
                    "configurations",
                    f"two configurations have the name {configuration.name!r}",
                    line,
                    "give each configuration its own name",
                )
            )
        seen.add(configuration.name)
    return problems


def _problem(error: ErrorDetails, document: Document) -> Problem:
    location, value = error["loc"], error.get("input")
    path = ".".join(str(part) for part in location)
    line = document.line(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return Problem(
            path,
            f"unknown key {location[-1]!r}",
            line,
            did_you_mean(str(location[-1]), known) or f"known: {', '.join(known)}",
        )
    if not location:
        return Problem("", _message(error["msg"]), None, "docs/bench.md explains every key")
    if error["type"] == "missing":
        return Problem(path, f"{path} is missing", line, "docs/bench.md explains every key")
    return Problem(path, f"{path}: {_message(error['msg'])}, got {shown(value)}", line)


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "load": Load,
        "quality": Quality,
        "configurations": Configuration,
        "matrix": Matrix,
        "search": Search,
        "generate": GenerationPlan,
    }
    nested: dict[str, type[BaseModel]] = {"stages": Stage, "spike": Spike, "generation": Generation}
    section = sections.get(str(location[0]), Plan) if location else Plan
    section = nested.get(str(location[1]), section) if len(location) > 1 else section
    return list(section.model_fields)


def _message(message: str) -> str:
    """Return a message of pydantic in the style of inferctl's errors."""
    return message.replace("Input should be", "must be").replace("Value error, ", "")
