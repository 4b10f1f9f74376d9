"""Checks whether a spec fits a base, a stack and hardware, and returns findings. Pure functions over catalog facts."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from inferctl.config.spec import Spec
from inferctl.core.sizes import size
from inferctl.facts import catalog, drivers
from inferctl.facts.catalog import BaseImage, Hardware, Stack
from inferctl.facts.precision import Level, best_precision, capability_of, support
from inferctl.models import image_source
from inferctl.models.decoder import KvCapacity

Verdict = Literal["ok", "warn", "error"]
_WORST = ("ok", "warn", "error")

# CUDA context, library workspaces and allocator overhead of one process. A conservative round figure, not measured.
CUDA_OVERHEAD_BYTES = 1_000_000_000
# An engine process on a CPU without its weights: 250 MB of anonymous memory with 23 million parameters.
CPU_PROCESS_BYTES = 250_000_000
BYTES_PER_PARAMETER = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
_FULL_SHARE = 0.9
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Finding:
    """The result of one check. `topic` is a stable name. `part` is a hardware key, None for the spec and the image.

    An `ok` finding has a hint only if it contains advice.
    """

    level: Verdict
    topic: str
    what: str
    why: str
    hint: str | None = None
    part: str | None = None

    def text(self) -> str:
        """Return the finding as one line of text."""
        return f"{self.what} [{self.topic}]: {self.why}" + (f". Fix: {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the device: weights, activations of one layer for a full batch, and the overhead of CUDA.

    `adapters`: what vLLM allocates for them, used or not.
    """

    weights: int
    activations: int
    overhead: int
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.overhead + self.adapters


@dataclass(frozen=True)
class Fit:
    """How one part runs the spec.

    `level` is `depends` for a CPU, because its instructions are unknown. `kernels` is None if unknown. `memory` is None
    if the size of the model is unknown. `capacity`: the sequences of a generative model that run at a time.
    """

    part: str
    requested: str
    precision: str
    level: Level | Literal["depends"]
    reason: str
    kernels: bool | None
    memory: Memory | None
    memory_bytes: int | None
    findings: tuple[Finding, ...]
    capacity: KvCapacity | None = None

    @property
    def verdict(self) -> Verdict:
        return worst(self.findings)


@dataclass(frozen=True)
class ModelSize:
    """The facts of a model for a memory estimate: its number of parameters and its `config.json`.

    `weights_bytes`: size of its safetensors files. `has_modules`: whether it has the `modules.json` of an embedding
    model. `library_type`: as in `ModelFolder`. `adapter_numbers`: in vLLM's slots for adapters, by kind of device.
    """

    parameters: int
    config: Mapping[str, Any]
    weights_bytes: int = 0
    has_modules: bool = False
    library_type: str | None = None
    adapter_numbers: Mapping[str, int] | None = None


@dataclass(frozen=True)
class UnknownSize:
    """Why the memory of a model cannot be estimated, and a hint."""

    why: str
    hint: str


# No size in a `config.json` is larger. Others write these files.
_MAX_SIZE = 2**32


def worst(findings: tuple[Finding, ...] | list[Finding]) -> Verdict:
    """Return the most severe level of `findings`; ok without findings."""
    return max((finding.level for finding in findings), key=_WORST.index, default="ok")


def check_image(spec: Spec, base: BaseImage, stack: Stack, *, hub_model: bool, today: datetime.date) -> list[Finding]:
    """Return the findings about the image that do not depend on hardware, for `inferctl check` and `inferctl build`.

    `hub_model`: whether the source is a hub id, so that its revision is checked.
    """
    return [
        *(_revision(spec) if hub_model else _image_digest(spec)),
        *_base_digest(spec, base),
        *_end_of_life(base, today),
        *_platform(spec, base, stack),
        *_python(base, stack),
    ]


def check_part(
    spec: Spec, base: BaseImage, stack: Stack, part: Hardware, model: ModelSize | UnknownSize, driver: int | None = None
) -> Fit:
    """Return how `part` runs `spec` on `base` with `stack`. `driver`: driver branch of the nodes, None if unknown."""
    requested = spec.serve.precision
    precision = best_precision(part.traits) if requested == "auto" else requested
    level, reason = _level(precision, part)
    batch = spec.serve.max_batch_tokens
    need = model if isinstance(model, UnknownSize) else memory(model, precision, batch, part)
    findings = [
        *_precision(precision, level, reason, part),
        *hardware_findings(base, stack, part, driver),
        _memory(need, part),
    ]
    shown = need if isinstance(need, Memory) else None
    kernels = has_kernels(stack, part)
    found = of_part(findings, part)
    return Fit(part.key, requested, precision, level, reason, kernels, shown, part.memory_bytes, found)


def of_part(findings: Iterable[Finding], part: Hardware) -> tuple[Finding, ...]:
    """Return findings that name their hardware."""
    return tuple(replace(each, part=part.key) for each in findings)


def together(fits: Mapping[str, Fit], part: Hardware) -> Fit:
    """Return how `part` runs the models of one server, by name: their memory adds up."""
    first, *others = fits.values()
    if not others:
        return first
    needs = {name: each.memory for name, each in fits.items() if each.memory}
    findings = [one for each in fits.values() for one in each.findings if one.topic != "memory" or not each.memory]
    findings.append(memory_of_all(needs, part.memory_bytes, part.key, cuda=part.kind == "cuda"))
    known = zip(*map(astuple, needs.values()), strict=True) if len(needs) == len(fits) else None
    total = Memory(*map(sum, known)) if known else None
    return replace(first, memory=total, findings=tuple(dict.fromkeys(findings)))


def hardware_findings(base: BaseImage, stack: Stack, part: Hardware, driver: int | None) -> Iterator[Finding]:
    """Yield the findings about kernels, driver and MIG slice, which are the same for every task."""
    yield from _kernels(stack, has_kernels(stack, part), part)
    yield from _driver(base, stack, part, driver)
    yield from _slice(part)


def has_kernels(stack: Stack, part: Hardware) -> bool | None:
    """Return whether `stack` has kernels for `part`; None if unknown."""
    return stack.has_kernels(capability_of(part.compute_capability)) if part.compute_capability else True


def memory(model: ModelSize, precision: str, batch_tokens: int, part: Hardware) -> Memory:
    """Estimate the memory of serving `model` in batches of `batch_tokens` tokens with packed attention.

    Weights: parameters x bytes. With int8, the embedding table stays in 16 bits. Activations: per token, five vectors
    of the hidden size and two of the feed-forward width, for one layer at a time, because inference keeps no other
    layer.
    """
    config = model.config
    hidden = _first_int(config, "hidden_size", "dim", "n_embd", "d_model")
    width = _first_int(config, "intermediate_size", "hidden_dim", "n_inner", "d_ff") or 4 * hidden
    table = min(model.parameters, _first_int(config, "vocab_size") * hidden)
    weights = model.parameters * BYTES_PER_PARAMETER[precision] + (table if precision == "int8" else 0)
    cell = 4 if precision == "fp32" else 2
    activations = batch_tokens * (5 * hidden + 2 * width) * cell
    return Memory(weights, activations, CUDA_OVERHEAD_BYTES if part.kind == "cuda" else 0)


def memory_of_all(needs: Mapping[str, Memory], available_bytes: int | None, part: str, *, cuda: bool) -> Finding:
    """Return the finding about the memory of several models, by name, that share the hardware `part`.

    Each has a process of its own.
    """
    overhead = CUDA_OVERHEAD_BYTES if cuda else CPU_PROCESS_BYTES
    needs = {name: replace(need, overhead=overhead) for name, need in needs.items()}
    total = sum(need.total for need in needs.values())
    why = "; ".join(
        f"{name} {size(need.total, 1)}: {size(need.weights, 1)} of weights, "
        f"{size(need.activations, 1)} of activations, {size(need.overhead, 1)} for its process"
        for name, need in needs.items()
    )
    level: Verdict = "ok"
    what, hint = f"all models need about {size(total, 1)}, estimated", None
    if available_bytes is not None:
        what += f", of {size(available_bytes, 1)}"
        if total > _FULL_SHARE * available_bytes:
            level = "error" if total > available_bytes else "warn"
            hint = "use a smaller serve.max_batch_tokens, more memory, or another server for some of the models"
    return Finding(level, "memory.all", what, why, hint, part)


def _first_int(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int) and value < _MAX_SIZE), 0)


def _revision(spec: Spec) -> Iterator[Finding]:
    revision = spec.model.revision
    if revision and _COMMIT.fullmatch(revision):
        return
    what = "the model revision is not pinned" + (f": {revision!r} is not a commit" if revision else "")
    why = f"{spec.model.source} can change between two builds of the same spec"
    hint = "run `inferctl pin` to write the current commit into the spec, or set model.revision to a tested commit"
    if spec.model.weights != "mount":
        hint += "; `inferctl build --allow-floating` builds an unpinned revision"
    yield Finding("warn", "revision", what, why, hint)


def _image_digest(spec: Spec) -> Iterator[Finding]:
    source = spec.model.source
    if image_source.is_image(source) and image_source.digest(source) is None:
        hint = "run `inferctl pin` to write its digest into the spec"
        if spec.model.weights != "mount":
            hint += "; `inferctl build --allow-floating` builds with the current image of the tag"
        yield Finding("warn", "revision", f"{source} is not pinned by digest", "the tag can be moved or deleted", hint)


def _base_digest(spec: Spec, base: BaseImage) -> Iterator[Finding]:
    reference = spec.image.base_image or base.reference
    if "@sha256:" not in reference and not (base.digest and not spec.image.base_image):
        why = "the tag can be moved or deleted"
        hint = "run `inferctl pin` to write its digest into the spec, or set image.base_image to a mirror with a digest"
        yield Finding("warn", "base.digest", f"{reference} is not pinned by digest", why, hint)


def _end_of_life(base: BaseImage, today: datetime.date) -> Iterator[Finding]:
    if base.end_of_life is None:
        why = base.notes.get("end_of_life", "not recorded")
        yield Finding("ok", "base.end_of_life", f"{base.key}: end of life unknown", why)
        return
    end, note = base.end_of_life, base.notes.get("end_of_life", "")
    hint = "mirror the image and set image.base_image, or select a newer base: `inferctl catalog bases`"
    if today >= end:
        why = f"NVIDIA deletes its tags six months later; {note}" if base.cuda else note
        yield Finding("warn", "base.end_of_life", f"{base.key} is past its end of life, {end}", why, hint)
    elif today >= end - datetime.timedelta(days=180):
        yield Finding("warn", "base.end_of_life", f"{base.key} reaches its end of life on {end}", note, hint)
    else:
        yield Finding("ok", "base.end_of_life", f"{base.key} is maintained until {end}", note)


def _platform(spec: Spec, base: BaseImage, stack: Stack) -> Iterator[Finding]:
    wanted = spec.image.platform
    if wanted not in base.platforms:
        what, known = f"{base.key} is not available for {wanted}", ", ".join(base.platforms)
        hint = "set image.platform or --platform, or select another base"
        yield Finding("error", "platform", what, f"it is available for {known}", hint)
    elif wanted not in stack.platforms and not spec.image.locks:
        known = ", ".join(stack.platforms)
        why = f"its lock and its kernel list are for {known}; aarch64 wheels differ: they have no sm_75"
        hint = "set image.locks to your own lock"
        yield Finding("error", "platform", f"{stack.key} has no lock for {wanted}", why, hint)


def _python(base: BaseImage, stack: Stack) -> Iterator[Finding]:
    if base.python.version not in stack.python:
        why = f"its wheels are for Python {', '.join(stack.python)}"
        hint = "select a stack and a base with the same Python: `inferctl catalog stacks`"
        yield Finding("error", "python", f"{stack.key} has no wheel for Python {base.python.version}", why, hint)


def _level(precision: str, part: Hardware) -> tuple[Level | Literal["depends"], str]:
    if part.kind == "cpu" and precision not in ("fp32", "fp8"):
        needs = {"bf16": "avx512_bf16 or amx_bf16", "fp16": "avx512_fp16 or amx_fp16", "int8": "VNNI or AMX"}[precision]
        return "depends", f"native on a processor with {needs}, otherwise emulated and slow"
    result = support(precision, part.traits)
    return result.level, result.reason


def _precision(precision: str, level: Level | Literal["depends"], reason: str, part: Hardware) -> Iterator[Finding]:
    if level == "depends":
        what, hint = f"{precision} depends on the processor", "run `inferctl doctor` on the target machine"
        yield Finding("warn", "precision", what, reason, hint)
        return
    if level == "unsupported":
        better = f"set serve.precision: {best_precision(part.traits)}"
        yield Finding("error", "precision", f"{precision} is not supported", reason, better)
    elif level == "emulated":
        better = f"set serve.precision: {best_precision(part.traits)}, or auto to select it for each hardware"
        yield Finding("warn", "precision", f"{precision} is emulated", reason, better)
    else:
        yield Finding("ok", "precision", f"{precision} is native", reason)
    if precision == "int8" and level == "native":
        what = "int8 saves memory but not time"
        why = "LLM.int8 halves the weights; it was slower than fp16 or bf16 in every measurement (T4: 2.5x, A100: 5x)"
        hint = f"for speed, set serve.precision: {best_precision(part.traits)}"
        yield Finding("ok", "int8", what, why, hint)


def _kernels(stack: Stack, kernels: bool | None, part: Hardware) -> Iterator[Finding]:
    if part.kind == "cpu":
        if stack.cuda:
            why = f"{stack.key} contains CUDA {stack.cuda}, which a CPU does not use"
            smaller = "set image.base: vllm-cpu" if stack.vllm else "set image.base: cpu"
            yield Finding("warn", "kernels", "the image is larger than necessary", why, smaller)
        return
    if not stack.cuda:
        why = f"{stack.key} is built without CUDA and cannot use the GPU"
        hint = "select a base with CUDA: `inferctl catalog bases`"
        yield Finding("error", "kernels", "the stack has no CUDA", why, hint)
        return
    built = ", ".join(stack.sm) or "none known"
    ptx = {True: "PTX", False: "no PTX", None: "PTX unknown"}[stack.ptx]
    why = f"{stack.key} is built for compute capability {built} ({ptx}); the part is {part.compute_capability}"
    if kernels:
        yield Finding("ok", "kernels", "the stack has kernels", why)
    elif kernels is None:
        hint = "test it on the hardware, or select a stack with a complete list: `inferctl catalog stacks`"
        yield Finding("warn", "kernels", "unknown whether the stack has kernels", why, hint)
    else:
        hint = "select another base: `inferctl catalog stacks` lists the kernels of each stack"
        yield Finding("error", "kernels", f"{stack.key} has no kernels for {part.compute_capability}", why, hint)


def judge_driver(base: BaseImage, stack: Stack, gpu: drivers.CudaGpu, driver: int) -> drivers.DriverVerdict | None:
    """Return whether `driver` runs images of `base` with `stack` on `gpu`; None for images without CUDA."""
    image = catalog.cuda_image(base, stack)
    return drivers.judge(image, gpu, driver, drivers.cuda_of_driver(driver)) if image else None


def _driver(base: BaseImage, stack: Stack, part: Hardware, driver: int | None) -> Iterator[Finding]:
    image = catalog.cuda_image(base, stack)
    if part.kind == "cpu" or image is None:
        return
    gpu = catalog.cuda_gpu_of(part)
    if driver is None:
        hint = "find the driver of a node with `nvidia-smi` and check it with `inferctl check --driver 535`"
        why = f"{stack.key} is built for CUDA {stack.cuda}"
        yield Finding("ok", "driver", drivers.describe_drivers(image, gpu), why, hint)
        return
    verdict = drivers.judge(image, gpu, driver, drivers.cuda_of_driver(driver))
    yield Finding(verdict.level, "driver", verdict.what, verdict.why, verdict.hint)


def _memory(need: Memory | UnknownSize, part: Hardware) -> Finding:
    if isinstance(need, UnknownSize):
        return Finding("warn", "memory", "memory not checked", need.why, need.hint)
    sizes = (size(value, 1) for value in (need.weights, need.activations, need.overhead))
    why = "weights {}, activations of one full batch {}, CUDA overhead {}".format(*sizes)
    if part.memory_bytes is None:
        what = f"needs about {size(need.total, 1)}, estimated"
        return Finding("ok", "memory", what, f"{why}; the profile has no memory size")
    what = f"needs about {size(need.total, 1)} of {size(part.memory_bytes, 1)}, estimated"
    if need.total > part.memory_bytes:
        hint = "use int8, a smaller serve.max_batch_tokens, or hardware with more memory"
        return Finding("error", "memory", f"does not fit: {what}", why, hint)
    if need.total > _FULL_SHARE * part.memory_bytes:
        return Finding("warn", "memory", f"tight: {what}", why, "set a smaller serve.max_batch_tokens")
    return Finding("ok", "memory", what, why)


def _slice(part: Hardware) -> Iterator[Finding]:
    if not part.mig:
        return
    compute, memory_share = part.mig.compute_share, part.mig.memory_fraction
    what = f"{compute:.1%} of the GPU's compute, {memory_share:.1%} of its memory"
    why = (
        f"{part.mig.sms} of {part.mig.parent_sms} multiprocessors;"
        " bandwidth is assumed proportional to memory, not measured"
    )
    misleading_name = memory_share - compute > 0.05
    hint = "plan its load by its share of compute, not by its memory or name" if misleading_name else None
    yield Finding("ok", "slice", what, why, hint)
