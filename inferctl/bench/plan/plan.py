"""Benchmark plans: which configurations run under which load. Read from `benchmarks/plans/*.yaml` or from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from pydantic import BaseModel, Field, ValidationError, model_validator

from inferctl.bench.plan.overrides import Overrides, apply, merge_generation
from inferctl.bench.plan.sections import Configuration, GenerationPlan, Quality, Search
from inferctl.bench.plan.shape import DOCUMENTS, Generation, Keys, Load, Name, Spike, Stage
from inferctl.config.spec_types import Section, Task
from inferctl.core import assets, validation
from inferctl.core.document import Document, read
from inferctl.core.errors import Problem, SpecError, UsageError, did_you_mean, shown

_GUIDE = "docs/reference/settings.md lists the keys of a plan"
# The limit in seconds of a request to a generation server, if the plan sets none.
_GENERATION_TIMEOUT_S = 300.0


class Plan(Section):
    """Everything that defines a benchmark. Two runs of equal plans on the same machine do the same work.

    It may have no configurations: they then come from the command line.
    """

    name: Name = Field(description="Name of the plan, in files and reports.")
    description: str = Field("", description="Text about the plan.")
    configurations: list[Configuration] = Field(
        default_factory=list, description="What to measure. Default: `--precision` or `--url`."
    )
    search: Search | None = Field(None, description="Find the highest rate within an SLO.")
    load: Load = Field(default_factory=lambda: Load.model_validate({}), description="The requests.")
    generate: GenerationPlan | None = Field(None, description="The keys that differ for models of generation.")
    corpus: str = Field(
        "mixed",
        description="`short` (queries, 6 to 19 tokens), `paragraphs` (47 to 180), `mixed` (log-normal, median 40), "
        '`passages` (256 to 512), a `.jsonl` file (`{"text": ...}` per line) or a `.txt` file.',
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of texts and times.")
    repeats: int = Field(1, ge=1, le=100, description="Runs per configuration.")
    error_budget_percent: float = Field(
        0.1, ge=0, le=100, description="Percentage of failed requests above which a configuration is invalid."
    )
    quality: Quality | None = Field(
        default_factory=lambda: Quality.model_validate({}),
        description="Comparison with fp32, and the limits below which a configuration cannot win. `null`: none.",
    )

    @model_validator(mode="after")
    def _check_loads(self) -> Plan:
        if self.search and self.repeats > 1:
            raise ValueError(
                "a search measures each configuration once and repeats uncertain probes itself: remove repeats"
            )
        loads = [(configuration.name, configuration.load) for configuration in self.configurations]
        loads += [("generate", self.generate.load)] if self.generate else []
        for name, changes in loads:
            try:
                self.load_with(changes)
            except ValidationError as error:
                where, message = validation.first_message(error)
                raise ValueError(f"the load of {name}: {where}: {message}") from None
        return self

    def load_with(self, changes: Mapping[str, object] | None) -> Load:
        """Return the plan's load with `changes`.

        Without a `mode` in `changes`, a rate makes the loop open and a number of users makes it closed.
        """
        if not changes:
            return self.load
        implied = {"mode": "open"} if "rate" in changes else {"mode": "closed"} if "users" in changes else {}
        own = self.load.model_dump(exclude_unset=True)
        if not {"rate", "users", "stages"}.isdisjoint(changes):
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
        loads = [self.load.model_dump(exclude_none=True), *(each.load or {} for each in self.configurations)]
        for key in ("prompt_name", "query_share") if task != "embed" else ():
            if any(load.get(key) is not None for load in loads):
                raise UsageError(
                    f"`load.{key}` is for embeddings, but the task of the model is {task}", "remove it from the plan"
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
        # A load with names sets the inputs of each (`Load.of_name`).
        ranks = task == "rerank" and "inputs_per_request" not in given and not any(load.get("names") for load in loads)
        count = DOCUMENTS if ranks else self.load.inputs_per_request
        load = self.load.model_copy(update={"task": task, "inputs_per_request": count})
        return self.model_copy(update={"load": load})

    def _for_generation(self) -> Plan:
        """Return the plan with its keys for generation."""
        own = self.generate or GenerationPlan.model_validate({})
        requests = self.load.generation.model_dump(exclude_unset=True) if self.load.generation else {}
        requests = merge_generation(
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
        keys = self.model_dump(exclude_unset=True)
        keys["configurations"] = [each.model_dump() for each in self.configurations]
        keys["load"] = self.load.model_dump(exclude_unset=True)
        try:
            return Plan.model_validate(apply(keys, precisions, overrides))
        except ValidationError as error:
            where, message = validation.first_message(error)
            value = shown(error.errors()[0].get("input"))
            raise UsageError(
                f"{where} cannot be {value}: {message}" if where else message,
                "`inferctl bench --help` lists the options",
            ) from None

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


@dataclass(frozen=True)
class Run:
    """One measurement of one configuration; `repeat` counts from 0."""

    configuration: str
    repeat: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder, as in `bf16-1`."""
        return f"{self.configuration}-{self.repeat + 1}"


def names() -> list[str]:
    """Return the names of the plans that come with inferctl."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def read_plan(name: str) -> Plan:
    """Return the plan called `name`, or the plan in the YAML file `name`.

    Raises `UsageError` if there is no such plan, and `SpecError` with every error and its line.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else _folder() / f"{name}.yaml"
    if not path.is_file():
        known = names()
        hint = did_you_mean(name, known) or f"known plans: {', '.join(known)}; or pass the path of a YAML file"
        raise UsageError(f"plan {name!r} not found", hint)
    document = read(path, _GUIDE)
    try:
        plan = Plan.model_validate(document.data).with_checkpoints_in(path.parent.absolute())
    except ValidationError as error:
        raise SpecError(document.file, validation.problems(error, document, _keys_at, ""), _GUIDE) from None
    if problems := _contradictions(plan, document):
        raise SpecError(document.file, problems, _GUIDE)
    return plan


def _folder() -> Path:
    return assets.root() / "benchmarks" / "plans"


def _contradictions(plan: Plan, document: Document) -> list[Problem]:
    given = [each.name for each in plan.configurations]
    problems = [
        Problem(
            "configurations",
            f"two configurations have the name {name!r}",
            document.line(["configurations", index]),
            "give each configuration its own name",
        )
        for index, name in enumerate(given)
        if name in given[:index]
    ]
    if plan.load.mode == "open" and not (plan.load.rate or plan.load.capacity_percent or plan.load.stages):
        line, advice = document.line(["load"]), "add `rate: 50` (requests/s)"
        problems.insert(0, Problem("load.rate", "an open loop requires load.rate", line, advice))
    return problems


def _keys_at(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "load": Load,
        "quality": Quality,
        "configurations": Configuration,
        "search": Search,
        "generate": GenerationPlan,
    }
    nested: dict[str, type[BaseModel]] = {"stages": Stage, "spike": Spike, "generation": Generation}
    section = sections.get(str(location[0]), Plan) if location else Plan
    section = nested.get(str(location[1]), section) if len(location) > 1 else section
    return list(section.model_fields)
