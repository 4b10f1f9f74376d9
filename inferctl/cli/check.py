"""`inferctl check`: validate the spec, and judge on which hardware it can run."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from inferctl.cli import completion, console, options
from inferctl.cli.options import Json, ModelSource, PrecisionOption, SpecFile, load
from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError, SpecError, UsageError, install_hint
from inferctl.core.sizes import size
from inferctl.facts import catalog
from inferctl.facts.catalog import BaseImage, Stack
from inferctl.image import model_image
from inferctl.image.from_spec import missing_files
from inferctl.models import convert, generation_fit, hub, image_source
from inferctl.models.decoder import TYPICAL_TOKENS, KvCapacity
from inferctl.models.fit import (
    Finding,
    Fit,
    Memory,
    ModelSize,
    UnknownSize,
    check_image,
    check_part,
    memory_of_all,
    worst,
)
from inferctl.models.hub import HubModel
from inferctl.models.model import ModelFolder, is_hub_id, resolve_task
from inferctl.models.size import locate, size_of

_MARK = {"ok": "note", "warn": "warn", "error": "error"}
_NEEDS = {
    "mount": "the server needs its weights",
    "bake": "the image needs its weights",
    "download": "the container downloads its weights when it starts",
}
# Topics of errors that do not depend on the hardware.
_ON_ALL_HARDWARE = ("architecture", "context", "gpus", "task", "base.task")
_STYLE = {"ok": "cyan", "warn": "yellow", "error": "bold red"}


def check(
    spec_file: SpecFile = None,
    model: ModelSource = None,
    precision: PrecisionOption = None,
    hardware: Annotated[
        list[str] | None,
        options.hardware_option(
            "Check this hardware, or `all`; repeatable. [default: the spec's]", completion.HARDWARE_OR_ALL
        ),
    ] = None,
    driver: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION", help="Check against this NVIDIA driver of the nodes, such as 535 or 535.129.03."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate the spec, and check on which hardware it can run.

    Exit code 2: the spec is wrong, or it cannot run on some of the hardware.

    Example: inferctl check --hardware all
    """
    flags = {
        "model.source": model,
        "serve.precision": precision,
        "hardware": None if not hardware or "all" in hardware else hardware,
    }
    try:
        resolved = load(spec_file, flags, several=True)
    except SpecError as error:
        if as_json:
            problems = [vars(problem) for problem in error.problems]
            console.document({"ok": False, "file": error.file, "problems": problems, **console.failure(error)})
        raise
    all_hardware = bool(hardware) and "all" in (hardware or [])
    judgments = [_judge(one, all_hardware, _major(driver)) for one in resolved.spec.each()]
    findings = _together(judgments) if resolved.spec.models else judgments[0].findings
    if as_json:
        documents = [_document(judgment, resolved.file) for judgment in judgments]
        console.document(_document_of_all(documents, findings) if resolved.spec.models else documents[0])
    else:
        _report(judgments, findings, resolved.file)
    if worst(findings) == "error":
        raise typer.Exit(2)


@dataclass(frozen=True)
class _Judgment:
    """What is known of a spec. `task`: `auto` if the model is not known.

    `summary`: how the server uses the model; None if that is not known or not supported. `general`: findings that are
    not about one kind of hardware.
    """

    spec: Spec
    base: BaseImage
    stack: Stack
    task: str
    summary: dict[str, Any] | None
    general: list[Finding]
    fits: list[Fit]

    @property
    def findings(self) -> list[Finding]:
        """All findings."""
        return [*self.general, *(finding for fit in self.fits for finding in fit.findings)]


def _major(driver: str | None) -> int | None:
    if driver is None:
        return None
    match = re.fullmatch(r"[Rr]?([1-9][0-9]{2,3})(?:\.[0-9]{1,4}){0,2}", driver)
    if not match:
        raise UsageError(
            f"--driver: {driver!r} is not a driver version",
            "pass the version that `nvidia-smi` prints, such as 535.129.03, or 535",
        )
    return int(match[1])


def _judge(spec: Spec, all_hardware: bool, driver: int | None) -> _Judgment:
    base = catalog.base(spec.image.base)
    stack = catalog.stack(base.stack)
    parts = list(catalog.hardware_profiles()) if all_hardware else spec.hardware
    hub_model = is_hub_id(spec.model.source)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    general = [*check_image(spec, base, stack, hub_model=hub_model, today=today), *missing_files(spec, base)]
    if not parts:
        why = "precision, kernels, driver and memory depend on the hardware and were not checked"
        hint = "set `hardware: [t4]` in the spec, or pass `--hardware all`"
        general.append(Finding("warn", "hardware", "no hardware specified", why, hint))
    try:
        found = locate(spec, model_image.facts)
    except UsageError as error:
        general.append(Finding("error", "model", error.message, _NEEDS[spec.model.weights], error.hint))
        found = UnknownSize("the model was not found", "fix the model first")
    adapters, of_adapters = generation_fit.check_adapters(spec, found)
    size = size_of(found, adapters, spec.serve)
    task, summary = _use(spec, found, general)
    general += of_adapters if task == "generate" else []
    try:
        catalog.check_task(task, base, stack)
    except UsageError as error:
        general.append(Finding("error", "base.task", error.message, "`inferctl build` rejects it", error.hint))
    if task != "auto":
        general += generation_fit.check_settings(spec, task)
    elif stack.vllm is None:
        why = "the model is not on this machine, so whether it matches the base was not checked"
        hint = "if it is generative, set `model.task: generate` and `image.base: vllm-cuda13.0`"
        general.append(Finding("warn", "task", "it is not known what the model is for", why, hint))
    judge = check_part
    if task == "generate":
        judge = generation_fit.check_part
        if isinstance(size, ModelSize):
            general += generation_fit.check_model(spec, size.config)
    fits = [judge(spec, base, stack, catalog.hardware(key), size, driver) for key in parts]
    general, fits = _with_errors_of_all_hardware(general, fits)
    return _Judgment(spec, base, stack, task, summary, general, fits)


def _use(
    spec: Spec, found: ModelFolder | HubModel | UnknownSize, findings: list[Finding]
) -> tuple[str, dict[str, Any] | None]:
    """Return the task and how the server uses the model, from its small files. Adds to `findings`.

    The tokenizer of a local folder is compared with that of transformers, as the start of a server does.
    """
    source, revision = spec.model.source, spec.model.revision
    if isinstance(found, UnknownSize):
        return spec.model.task, None
    try:
        task = resolve_task(spec.model.task, found, source)
    except UsageError as error:
        findings.append(Finding("error", "task", error.message, "the server does not start", error.hint))
        return spec.model.task, None
    summary = None
    try:
        from inferctl.reading import model_summary, task_config

        if isinstance(found, HubModel):
            if not found.weights_bytes:
                raise UsageError(f"{source} has no weights that can be served", "choose a model with safetensors")
            if image_source.is_image(source):
                raise NotReadyError(
                    f"{source} is not in the cache of this machine", f"run `inferctl model pull {source}`"
                )
            folder = hub.configuration(source, revision, found)
        else:
            folder = found.path
        summary = model_summary.read(task, folder)
        if (
            isinstance(found, ModelFolder)
            and task != "generate"
            and not (is_hub_id(source) and convert.needed(found))  # the start of the server converts it
        ):
            from inferctl.serve.engines import tokenizer_check

            tokenizer_check.checked(folder, task_config.read(task, folder, spec.serve.max_input_tokens)).close()
    except ModuleNotFoundError as error:
        what, hint = f"how the model is used was not checked: the package {error.name} is not installed", "serve"
        findings.append(Finding("warn", "model", what, "it needs no weights, but that package", install_hint(hint)))
        return task, summary
    except NotReadyError as error:
        findings.append(Finding("warn", "model", error.message, "how it is used was not checked", error.hint))
        return task, None
    except UsageError as error:
        findings.append(Finding("error", "architecture", error.message, "the server does not start", error.hint))
        return task, None
    if isinstance(found, HubModel) and found.pickled:
        findings.append(
            Finding(
                "warn",
                "weights",
                "its weights are pickles",
                "the first start converts them, without running their code; `inferctl build` does not bake them",
                f"convert them once: `inferctl convert {source} NEW_FOLDER`",
            )
        )
    if summary["own_code"] and task == "generate":
        why = "it is never run: unless vLLM knows the model, the server does not start"
        findings.append(Finding("warn", "code", "the model has code of its own (`auto_map` in config.json)", why))
    return task, summary


def _with_errors_of_all_hardware(general: list[Finding], fits: list[Fit]) -> tuple[list[Finding], list[Fit]]:
    """Move the general errors that no hardware can run to each hardware, so that its verdict is an error too."""
    errors = [finding for finding in general if finding.level == "error" and finding.topic in _ON_ALL_HARDWARE]
    if not errors or not fits:
        return general, fits
    moved = [
        replace(fit, findings=(*(replace(error, part=fit.part) for error in errors), *fit.findings)) for fit in fits
    ]
    return [finding for finding in general if finding not in errors], moved


def _together(judgments: list[_Judgment]) -> list[Finding]:
    """Return the findings about several models: those of one have its name, and the memory is that of all."""
    found: list[Finding] = []
    for judgment in judgments:
        for finding in judgment.findings:
            if all(finding in other.findings for other in judgments):
                found += [finding] if finding not in found else []
            else:
                found.append(replace(finding, what=f"{judgment.spec.name}: {finding.what}"))
        if judgment.task == "generate":
            why = "vLLM serves one model in each server"
            found.append(Finding("error", "task", f"{judgment.spec.name} is of the task generate", why))
    for fits in zip(*(judgment.fits for judgment in judgments), strict=True):
        needs = {one.spec.name: fit.memory for one, fit in zip(judgments, fits, strict=True) if fit.memory}
        cuda = catalog.hardware(fits[0].part).kind == "cuda"
        found.append(memory_of_all(needs, fits[0].memory_bytes, fits[0].part, cuda=cuda))
    return found


def _document_of_all(documents: list[dict[str, Any]], findings: list[Finding]) -> dict[str, Any]:
    verdict, listed = worst(findings), [vars(finding) for finding in findings]
    common = {"ok": verdict != "error", "verdict": verdict, "file": documents[0]["file"]}
    return {**common, "models": documents, "findings": listed, "problems": []}


def _document(judgment: _Judgment, file: str | None) -> dict[str, Any]:
    spec, base, stack, findings = judgment.spec, judgment.base, judgment.stack, judgment.findings
    return {
        "ok": worst(findings) != "error",
        "verdict": worst(findings),
        "file": file,
        "name": spec.name,
        "task": judgment.task,
        "precision": spec.serve.precision,
        "base": base.key,
        "stack": {"key": stack.key, "torch": stack.torch, "cuda": stack.cuda, "driver_floor": stack.driver_floor},
        "hardware": [
            {
                "key": fit.part,
                "verdict": fit.verdict,
                "precision": {
                    "requested": fit.requested,
                    "effective": fit.precision,
                    "level": fit.level,
                    "reason": fit.reason,
                },
                "kernels": fit.kernels,
                "memory": fit.memory and _memory(fit.memory, fit.memory_bytes),
                "generation": fit.capacity and _capacity(fit.capacity),
            }
            for fit in judgment.fits
        ],
        "findings": [vars(finding) for finding in findings],
        "problems": [],
        "model": judgment.summary,
    }


def _memory(need: Memory, available_bytes: int | None) -> dict[str, Any]:
    parts = {f"{name}_bytes": size for name, size in vars(need).items() if size or name != "adapters"}
    return {"estimated": True, "needs_bytes": need.total, "has_bytes": available_bytes, **parts}


def _capacity(capacity: KvCapacity) -> dict[str, Any]:
    return {"estimated": True, **vars(capacity), "typical_tokens": TYPICAL_TOKENS}


def _report(judgments: list[_Judgment], findings: list[Finding], file: str | None) -> None:
    fits = [fit for judgment in judgments for fit in judgment.fits]
    grouped = _grouped(findings)
    notes = Table.grid(padding=(0, 2))
    notes.add_column()
    notes.add_column(overflow="fold")  # a hint has commands to paste
    for finding, parts in grouped:
        notes.add_row(Text(_MARK[finding.level], style=_STYLE[finding.level]), Text(_explained(finding, parts)))
    errors, warnings = (sum(finding.level == level for finding, _ in grouped) for level in ("error", "warn"))
    counts = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    pieces: list[RenderableType] = []
    for one in judgments:
        spec, base, stack = one.spec, one.base, one.stack
        gpu = f"CUDA {stack.cuda}" if stack.cuda else "no CUDA"
        pieces += [
            Text(f"{spec.name}: {one.task}, {spec.serve.precision} on {base.key} (torch {stack.torch}, {gpu})"),
            *([Text(f"model: {line}")] if (line := _line(one.summary)) else []),
            Text(),
        ]
        if one.fits:
            pieces += [*(_generation_table(one.fits) if one.task == "generate" else [_table(one.fits)]), Text()]
    if sums := [each for each in findings if each.topic == "memory.all" and each.level == "ok"]:
        pieces += [*(Text(f"{each.part}: {each.what}") for each in sums), Text()]
    pieces += [
        notes,
        Text(f"\n{file or 'flags'}: {counts}" + (f"; {_runnable(fits)}" if fits and len(judgments) == 1 else "")),
    ]
    console.report(Group(*pieces))


def _line(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return ""
    from inferctl.reading import model_summary

    return console.plain(model_summary.line(summary))


def _runnable(fits: list[Fit]) -> str:
    """Return on how many of the hardware the spec can run, or has no known obstacle if memory was not checked."""
    count = f"{sum(fit.verdict != 'error' for fit in fits)} of {len(fits)}"
    if any(fit.memory is None and fit.verdict != "error" for fit in fits) or all(fit.memory is None for fit in fits):
        return f"{count} {'has' if len(fits) == 1 else 'have'} no known obstacle; memory was not checked"
    return f"{count} can run it"


def _table(fits: list[Fit]) -> Table:
    rows = []
    for fit in fits:
        memory = size(fit.memory.total, 1) if fit.memory else "not checked"
        if fit.memory and fit.memory_bytes:
            memory += f" of {size(fit.memory_bytes, 1)}"
        kernels = {True: "yes", False: "no", None: "unknown"}[fit.kernels]
        rows.append((fit.part, f"{fit.precision} {fit.level}", kernels, memory, _verdict(fit)))
    return console.table(("hardware", "precision", "kernels", "memory, estimated", "verdict"), rows)


def _verdict(fit: Fit) -> Text:
    return Text(fit.verdict, style="" if fit.verdict == "ok" else _STYLE[fit.verdict])


def _generation_table(fits: list[Fit]) -> list[RenderableType]:
    """Return the table of a generative model and a line that explains its estimates."""
    headings = ("hardware", "precision", "weights", "KV cache", "longest", "at once", "verdict")
    rows = [
        (
            fit.part,
            fit.precision if fit.level == "native" else f"{fit.precision}\n{fit.level}",
            size(fit.memory.weights, 1) if fit.memory else "-",
            size(fit.capacity.kv_cache_bytes, 1) if fit.capacity else "-",
            f"{fit.capacity.longest_context_tokens:,}" if fit.capacity else "-",
            f"{fit.capacity.sequences}/{fit.capacity.typical_sequences}" if fit.capacity else "-",
            _verdict(fit),
        )
        for fit in fits
    ]
    table = console.table(headings, rows, headings[:1], narrow=True)
    held = next((fit.capacity for fit in fits if fit.capacity), None)
    if held is None:
        return [table]
    context = f"{held.context_tokens:,} tokens" if held.context_tokens else "the longest context"
    gpus = f"; on each of {held.gpus} GPUs" if held.gpus > 1 else ""
    note = (
        f"estimated{gpus}. longest: tokens of the longest sequence that fits; at once: sequences of {context} / of "
        f"{TYPICAL_TOKENS:,} tokens, the mean of the Azure trace of conversations in 2023 (1,152 in, 212 out)"
    )
    return [table, Text(f"\n{note}")]


def _grouped(findings: list[Finding]) -> list[tuple[Finding, list[str]]]:
    """Return the findings to print, most severe first, each with the hardware it applies to. Equal ones are merged."""
    groups: dict[tuple[str, str, str, str | None], tuple[Finding, list[str]]] = {}
    for finding in findings:
        if finding.level != "ok" or finding.hint:
            key = (finding.topic, finding.what, finding.why, finding.hint)
            groups.setdefault(key, (finding, []))[1].extend([finding.part] if finding.part else [])
    return sorted(groups.values(), key=lambda group: ("error", "warn", "ok").index(group[0].level))


def _explained(finding: Finding, parts: list[str]) -> str:
    names = parts if len(parts) <= 3 else [*parts[:2], f"{len(parts) - 2} more"]
    return "\n".join(
        [
            (f"{', '.join(names)}: " if names else "") + finding.what,
            finding.why,
            *([f"hint: {finding.hint}"] if finding.hint else []),
        ]
    )


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"
