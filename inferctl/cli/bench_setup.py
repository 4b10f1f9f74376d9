"""From the options of `inferctl bench`, or from the folder of a bench that was cut short, to something that can run. Nothing is started here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferctl.cli import console, options

if TYPE_CHECKING:
    from inferctl.bench.load.target import Access
    from inferctl.bench.measure.environment import Environment
    from inferctl.bench.measure.outcome import BenchTarget, Outcome
    from inferctl.bench.measure.runner import Bench
    from inferctl.bench.plan.plan import Plan
    from inferctl.bench.report.receipts import Context
    from inferctl.settings import Resolved


@dataclass(frozen=True)
class Reach:
    """How the command line says that servers at --url are reached."""

    headers: list[str] = field(default_factory=list, repr=False)
    api_key_env: str | None = None
    served_model: str | None = None

    def access(self) -> Access:
        """Return the headers and the model name. Raises `UsageError`."""
        import os

        from inferctl.bench.load.target import Access
        from inferctl.errors import UsageError

        headers = dict(_header(text) for text in self.headers)
        if self.api_key_env is not None:
            if not (key := os.environ.get(self.api_key_env, "")):
                raise UsageError(
                    f"the environment variable {self.api_key_env} is not set",
                    f"set it to the key: `export {self.api_key_env}=...`",
                )
            if not key.isascii() or not key.isprintable():
                raise UsageError(
                    f"the key in {self.api_key_env} has characters that a header cannot have",
                    "check the variable for a line break at its end",
                )
            if any(name.lower() == "authorization" for name in headers):
                raise UsageError("both --api-key-env and --header set Authorization", "leave one of the two out")
            headers["Authorization"] = f"Bearer {key}"
        return Access(headers, self.served_model)

    def as_dict(self) -> dict[str, Any]:
        """Return what a bench writes down of it: no value of a header."""
        names = sorted(_header(text)[0].lower() for text in self.headers)
        return {"headers": names, "api_key_env": self.api_key_env, "served_model": self.served_model}


@dataclass(frozen=True)
class Given:
    """What the command line says; None and empty are not given."""

    spec_file: Path | None = None
    model: str | None = None
    plan: str | None = None
    precisions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    slo_p99_ms: float | None = None
    output: Path = Path("bench-results")
    reach: Reach = field(default_factory=Reach)


@dataclass(frozen=True)
class Ready:
    """Everything that can be wrong was found."""

    work: Bench
    context: Context
    outcomes: list[Outcome]


@dataclass(frozen=True)
class _Asked:
    """What both ways lead to: the bench as it was asked for, before its folder."""

    resolved: Resolved | None
    plan: Plan
    plan_file: str | None
    targets: list[BenchTarget]
    folder: Path | None
    slo_p99_ms: float | None
    access: Access


def start(given: Given) -> Ready:
    """A new bench, in a folder of its own."""
    from inferctl.bench.measure import environment, resume, runner
    from inferctl.bench.plan import plan as plans
    from inferctl.errors import UsageError

    url_targets = [_target(text) for text in given.urls]
    if given.reach != Reach() and not url_targets:
        raise UsageError(
            "--header, --api-key-env and --served-model are for servers that run already",
            "name one: `--url NAME=URL`",
        )
    access = given.reach.access()
    # As `go_on` will name it, from whichever folder that is called.
    if given.model and Path(given.model).exists():
        given = replace(given, model=str(Path(given.model).absolute()))
    resolved = _settings(given, needed=not url_targets or bool(given.precisions))
    name = given.plan
    if name is None:
        name = resolved.spec.bench.plan if resolved else "precision"
    chosen = plans.load(name).with_overrides(given.precisions, **given.overrides)
    if given.overrides.get("users") is not None and chosen.load.mode == "open" and not chosen.load.capacity_percent:
        console.warn(
            f"--users {given.overrides['users']} changes nothing: this load is an open loop, {_offered(chosen)}"
        )
    targets = _targets(chosen, url_targets, given)
    needed = any(target.url is None for target in targets) or given.model is not None
    slo = given.slo_p99_ms or (resolved.spec.slo.p99_ms if resolved else None)
    file = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) or "/" in name else None
    asked = _Asked(resolved, chosen, file, targets, None, slo, access)
    hardware(chosen.hardware)
    _check_search(asked)
    _check_neighbours(asked)
    _check_corpora(asked)
    # A download comes after everything that can be wrong without it.
    asked = replace(asked, folder=_model(resolved, needed))
    machine = environment.detect()
    what = _identity(asked, machine)
    place = _place(given.output, chosen.name)
    spec = str(Path(resolved.file).resolve()) if resolved and resolved.file else None
    called = {
        "spec": spec,
        "model": given.model,
        # Only what it sets: a load of a configuration says otherwise what follows from it, as stages say how long it lasts.
        "plan": chosen.model_dump(mode="json", exclude_unset=True),
        "plan_file": file,
        "slo_p99_ms": given.slo_p99_ms,
        "reach": given.reach.as_dict(),
    }
    resume.write_manifest(place, resume.Manifest(what, called))
    work, context = _bench(asked, machine, place)
    return Ready(work, context, runner.outcomes(work))


def go_on(output: Path, headers: list[str] | None = None) -> Ready:
    """Return the bench in `output`, from where it stopped.

    Raises `UsageError` if anything that its figures depend on has changed.

    `headers` are those that it had: no file holds them.
    """
    from inferctl.bench.measure import digests, environment, resume, runner
    from inferctl.bench.measure.outcome import BenchTarget

    output = output.resolve()
    manifest = resume.read_manifest(output)
    then, called = manifest.identity, manifest.called
    if then["code"] != (code := {"version": _version(), "sha256": digests.of_code()}):
        # Before anything else: another version may not even understand the rest.
        resume.check_unchanged({"code": then["code"]}, {"code": code}, output)
    reach = _reach(called["reach"], headers or [], output)
    chosen = _as_it_was(called["plan"])
    targets = [BenchTarget(**one) for one in then["subjects"]]
    own = any(target.url is None for target in targets)
    spec_file = Path(called["spec"]) if called["spec"] else None
    resolved = _settings(Given(spec_file, called["model"]), needed=own)
    slo = called["slo_p99_ms"] or (resolved.spec.slo.p99_ms if resolved else None)
    folder = _model(resolved, own or called["model"] is not None)
    asked = _Asked(resolved, chosen, called["plan_file"], targets, folder, slo, reach.access())
    machine = environment.detect()
    resume.check_unchanged(then, _identity(asked, machine), output)
    work, context = _bench(asked, machine, output)
    return Ready(work, context, runner.outcomes(work))


def _reach(then: dict[str, Any], headers: list[str], output: Path) -> Reach:
    """Return how a bench reached its servers. Raises `UsageError` if its headers are not those of the command line."""
    from inferctl.errors import UsageError

    reach = Reach(headers, then["api_key_env"], then["served_model"])
    if reach.as_dict() != then:
        wanted = " ".join(f"--header '{name}: ...'" for name in then["headers"]) or "no --header"
        raise UsageError(
            f"{output} cannot go on with other headers than it had", f"give {wanted}: no file holds the values"
        )
    return reach


def _as_it_was(plan: dict[str, Any]) -> Plan:
    """The plan of a bench that began; the traces that it names may be gone since, or no traces any more."""
    from pydantic import ValidationError

    from inferctl.bench.plan.plan import Plan
    from inferctl.errors import UsageError

    try:
        return Plan.model_validate(plan)
    except ValidationError as error:
        said = error.errors()[0]["msg"].replace("Value error, ", "")
        raise UsageError(f"the plan of this bench cannot be taken up again: {said}", "put it back as it was") from None


def _settings_sha256(resolved: Resolved | None) -> str | None:
    """Digest of the settings without what `bench` names: the plan, which is held in full beside it."""
    from inferctl import spec

    return resolved.spec.model_copy(update={"bench": spec.Bench.model_validate({})}).digest() if resolved else None


def _version() -> str:
    import inferctl

    return inferctl.__version__


def _identity(asked: _Asked, machine: Environment) -> dict[str, Any]:
    """What the figures depend on; reaches out to the servers that run already."""
    from inferctl import model as models
    from inferctl.bench.load.target import connect
    from inferctl.bench.measure import resume

    servers = {}
    for target in asked.targets:
        if target.url:
            info = connect(target.url, access=asked.access).info
            said = [(info.get("model") or {}).get("sha256"), (info.get("precision") or {}).get("effective")]
            servers[target.name] = said
    return resume.identity(
        asked.plan,
        asked.targets,
        machine,
        models.ModelFolder(asked.folder).digest if asked.folder else None,
        _settings_sha256(asked.resolved),
        servers,
        asked.plan_file,
    )


def _bench(asked: _Asked, machine: Environment, place: Path) -> tuple[Bench, Context]:
    from inferctl.bench.load import child_server
    from inferctl.bench.measure import neighbors, runner
    from inferctl.bench.report.receipts import Context

    resolved, command = asked.resolved, None
    if resolved and asked.folder:
        file = Path(resolved.file).resolve() if resolved.file else None
        command = child_server.serve_command(str(asked.folder), resolved.spec.name, file)
    mig_devices = neighbors.mig_devices(machine.variables) if asked.plan.neighbours else []
    work = runner.Bench(
        asked.plan, asked.targets, command, asked.folder, place, asked.slo_p99_ms, mig_devices, asked.access
    )
    wanted = [*asked.plan.hardware, *(resolved.spec.hardware if resolved else [])]
    context = Context(
        plan=asked.plan,
        environment=machine,
        model_source=resolved.spec.model.source if resolved else None,
        hardware_wanted=list(dict.fromkeys(wanted)),
        slo_p99_ms=asked.slo_p99_ms,
        output=place,
        targets=asked.targets,
        model=asked.folder,
    )
    return work, context


def _check_corpora(asked: _Asked) -> None:
    from inferctl.bench.plan import workload

    plan = asked.plan
    named = [plan.corpus, *(one.corpus for one in asked.targets), plan.quality.corpus if plan.quality else None]
    for corpus in dict.fromkeys(name for name in named if name):
        workload.read_corpus(corpus)


def _check_search(asked: _Asked) -> None:
    from inferctl.errors import UsageError

    search = asked.plan.search
    if search and not (search.slo_p99_ms or asked.slo_p99_ms):
        raise UsageError(
            "a search needs to know which p99 must hold",
            "give --slo 100 (ms), `search.slo_p99_ms` in the plan, or `slo.p99_ms` in the spec",
        )

    if search and search.budget_s is not None:
        _check_budget(asked, search.budget_s)


def _check_budget(asked: _Asked, budget_s: float) -> None:
    """Raise `UsageError` if the budget is too short for a search of each server."""
    import math

    from inferctl.bench.measure import search
    from inferctl.errors import UsageError

    settings, count = asked.plan.search, len(asked.targets)
    assert settings is not None
    each = [search.forecast(settings, asked.plan.load_with(one.load), budget_s / count) for one in asked.targets]
    if any(not one.enough for one in each):
        least = math.ceil(count * max(one.seconds for one in each))
        which = "a search" if count == 1 else f"{count} searches"
        raise UsageError(
            f"the budget of {budget_s:g} s is too short for {which}", f"give `--budget {least}` (seconds) or more"
        )


def seconds(text: str) -> float:
    """Return the seconds of `300`, `90s`, `5m` or `1.5h`. Raises `UsageError`."""
    import re

    from inferctl.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--budget {text!r} is not a time", "give seconds, or a time like 5m or 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _check_neighbours(asked: _Asked) -> None:
    from inferctl.bench.measure import neighbors
    from inferctl.errors import UsageError

    if asked.plan.neighbours:
        neighbors.reject_running_servers([target.name for target in asked.targets if target.url])
        if asked.plan.search:
            raise UsageError(
                "a search has no neighbours", "measure one rate beside neighbours: --rate 50 --neighbours 1"
            )


def _offered(plan: Plan) -> str:
    return f"{plan.load.rate:g} requests/s" if plan.load.rate else "with rates of its own"


def _settings(given: Given, needed: bool) -> Resolved | None:
    """Settings in force; None when only running servers are measured and nothing names a model."""
    from inferctl import spec
    from inferctl.errors import UsageError

    try:
        return options.load(given.spec_file, {"model.source": given.model, "bench.plan": given.plan})
    except UsageError:
        if needed or given.spec_file or given.model or Path(spec.DEFAULT_FILE).exists():
            raise
        return None


def _target(text: str) -> tuple[str, str]:
    import re

    from inferctl.errors import UsageError

    name, separator, address = text.partition("=")
    if (
        not separator
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or not address.startswith(("http://", "https://"))
    ):
        raise UsageError(f"--url {text!r} is not NAME=URL", "give one like `--url t4=http://10.0.0.7:8080`")
    if len(name) > 40:
        raise UsageError(
            f"the name {name!r} has {len(name)} characters, at most 40 fit", "give the server a shorter name"
        )
    return name, address


def _header(text: str) -> tuple[str, str]:
    """Return name and value of `--header 'Name: value'`. Raises `UsageError`, which does not show the value."""
    import re

    from inferctl.errors import UsageError

    name, separator, value = (part.strip() for part in text.partition(":"))
    if not separator or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value:
        raise UsageError("--header is not 'NAME: VALUE'", "give one like `--header 'X-Api-Key: abc'`")
    if not value.isascii() or not value.isprintable():
        raise UsageError(f"the value of the header {name} has characters that a header cannot have", "use plain ASCII")
    if name.lower() in ("content-length", "transfer-encoding", "connection", "content-type", "accept-encoding"):
        raise UsageError(f"the header {name} is set by the load generator", "leave it out")
    return name, value


def _targets(chosen: Plan, url_targets: list[tuple[str, str]], given: Given) -> list[BenchTarget]:
    """What is measured: the plan's configurations; with --url those servers, and our own only when --precision asks for them too."""
    from inferctl.bench.measure.outcome import BenchTarget
    from inferctl.errors import UsageError

    own = [
        BenchTarget(one.name, one.precision, None, one.max_batch_tokens, one.corpus, one.load)
        for one in (chosen.configurations if given.precisions or not url_targets else [])
    ]
    if url_targets and not own and given.overrides.get("batch_tokens"):
        raise UsageError(
            "--batch-tokens is for servers that are started here, and --url names one that runs already",
            "start that server with --max-batch-tokens, or add --precision",
        )
    corpora = list(dict.fromkeys(given.overrides.get("corpora") or []))
    several = corpora if len(corpora) > 1 else [None]
    targets = own + [
        BenchTarget(f"{name}-{Path(corpus).stem}" if corpus else name, url=address, corpus=corpus)
        for name, address in url_targets
        for corpus in several
    ]
    names = [target.name for target in targets]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"the name {sorted(repeated)[0]!r} is used twice", "give each server its own name: `--url NAME=URL`"
        )
    return targets


def hardware(texts: list[str]) -> list[str]:
    """Keys of the catalog out of `--hardware a,b --hardware c`. Raises `UsageError` for one that it does not know."""
    from inferctl import catalog
    from inferctl.errors import UsageError, did_you_mean

    known = list(catalog.hardware_profiles())
    keys = [key.strip() for text in texts for key in text.split(",") if key.strip()]
    for key in keys:
        if key not in known:
            hint = did_you_mean(key, known) or "`inferctl catalog hardware` lists what is known"
            raise UsageError(f"there is no hardware {key!r}", hint)
    return keys


def _place(output: Path, name: str) -> Path:
    """A new folder for one bench: two that start in the same second get two."""
    import itertools
    import time

    from inferctl.errors import NotReadyError

    first = (output / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    for place in itertools.chain([first], numbered):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir()
        except FileExistsError:
            if place.parent.is_dir():
                continue
            raise NotReadyError(f"{place.parent} is a file", "give another folder with --output") from None
        except OSError as error:
            raise NotReadyError(
                f"{place} cannot be made: {error.strerror}", "give another folder with --output"
            ) from None
        return place
    raise AssertionError("unreachable")


def _model(resolved: Resolved | None, needed: bool) -> Path | None:
    """The local model folder, downloaded if it is `needed`.

    None if only running servers are measured and the model is not on this machine: their vectors are then not checked.
    """
    from inferctl import hub
    from inferctl.cli import download

    if resolved is None:
        return None
    source, revision = resolved.spec.model.source, resolved.spec.model.revision
    found = download.fetch(source, revision) if needed else hub.cached(source, revision)
    return found.path.resolve() if found else None
