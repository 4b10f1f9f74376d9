"""What fits what, and why not: a spec on a base, a stack and a part -> findings. Pure; the facts are the catalog's."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from inferctl import catalog, drivers
from inferctl.catalog import BaseImage, Hardware, Level, Stack, best_precision, capability_of, support
from inferctl.sizes import size
from inferctl.spec import Spec

Verdict = Literal["ok", "warn", "error"]
_WORST = ("ok", "warn", "error")

# CUDA context, library workspaces and allocator slack of one process: a round, cautious figure, not a measurement.
CUDA_OVERHEAD_BYTES = 1_000_000_000
_BYTES_PER_PARAMETER = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_FULL = 0.9
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What torch's CUDA wheels bring themselves.
_IN_WHEELS = ("cublas", "cudnn", "nccl", "cusparse", "cufft")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. `topic` is a stable name, `part` a hardware key or None for the spec and the image.

    An `ok` finding with a hint is worth a reader's while; one without says that all is well.
    """

    level: Verdict
    topic: str
    what: str
    why: str
    hint: str | None = None
    part: str | None = None

    def text(self) -> str:
        """For people, on one line."""
        return f"{self.what} [{self.topic}]: {self.why}" + (f". Fix: {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the device: weights, one layer's activations for a full batch, and what CUDA takes."""

    weights: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.overhead


@dataclass(frozen=True)
class Fit:
    """How one part serves the spec. `level` is `depends` on a CPU whose instructions nobody named; `kernels` is None when
    unknown, `memory` when the model is not there to be read.
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

    @property
    def verdict(self) -> Verdict:
        return worst(self.findings)


@dataclass(frozen=True)
class ModelSize:
    """What the memory estimate needs of a model: its parameters, and its `config.json`."""

    parameters: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class UnknownSize:
    """Why the memory estimate has no figures for a model, and what to do about it."""

    why: str
    hint: str


def worst(findings: tuple[Finding, ...] | list[Finding]) -> Verdict:
    """The gravest level among `findings`; ok when there are none."""
    return max((finding.level for finding in findings), key=_WORST.index, default="ok")


def check_image(
    spec: Spec,
    base: BaseImage,
    stack: Stack,
    *,
    hub_model: bool,
    today: datetime.date,
    platforms: tuple[str, ...] | None = None,
) -> list[Finding]:
    """What is true of the image whatever it runs on: what `inferctl check` and `inferctl build` both say.

    `hub_model`: the source is a hub id, so that its revision matters. `platforms`: those of one build, instead of the spec's.
    """
    return [
        *(_revision(spec) if hub_model else ()),
        *_base_digest(spec, base),
        *_end_of_life(base, today),
        *_platforms(spec, base, stack, platforms or (spec.image.platform,)),
        *_python(base, stack),
        *_cuda_twice(base, stack),
    ]


def check_slo(spec: Spec) -> Finding:
    """Whether the spec says how fast it must be."""
    if spec.slo.p99_ms is None:
        why = "without one, no benchmark can say how much load a replica takes"
        return Finding("warn", "slo", "no SLO", why, "slo: {p99_ms: 70}")
    return Finding("ok", "slo", f"p99 within {spec.slo.p99_ms:g} ms", "set in the spec")


def check_part(
    spec: Spec, base: BaseImage, stack: Stack, part: Hardware, model: ModelSize | UnknownSize, driver: int | None = None
) -> Fit:
    """How `part` serves `spec` on `base` with `stack`. `driver`: the branch of the driver on its nodes, if known."""
    requested = spec.serve.precision
    precision = best_precision(part.traits) if requested == "auto" else requested
    level, reason = _level(precision, part)
    kernels = stack.has_kernels(capability_of(part.compute_capability)) if part.compute_capability else True
    batch = spec.serve.max_batch_tokens
    need = model if isinstance(model, UnknownSize) else memory(model, precision, batch, part)
    findings = [
        *_precision(precision, level, reason, part),
        *_kernels(stack, kernels, part),
        *_driver(base, stack, part, driver),
        _memory(need, part),
        *_slice(part),
    ]
    shown = need if isinstance(need, Memory) else None
    return Fit(part.key, requested, precision, level, reason, kernels, shown, part.memory_bytes, tuple(findings))


def memory(model: ModelSize, precision: str, batch_tokens: int, part: Hardware) -> Memory:
    """Estimated memory of serving `model` in batches of `batch_tokens` tokens with packed attention.

    Weights: parameters x bytes; int8 keeps the embedding table in 16 bits. Activations: five hidden vectors and two of
    the feed-forward width a token, for one layer at a time, since inference keeps no other. A generator's KV cache is
    added for one full batch.
    """
    config = model.config
    hidden = _first(config, "hidden_size", "dim", "n_embd", "d_model")
    width = _first(config, "intermediate_size", "hidden_dim", "n_inner", "d_ff") or 4 * hidden
    table = min(model.parameters, _first(config, "vocab_size") * hidden)
    weights = model.parameters * _BYTES_PER_PARAMETER[precision] + (table if precision == "int8" else 0)
    cell = 4 if precision == "fp32" else 2
    activations = batch_tokens * (5 * hidden + 2 * width) * cell
    if str((config.get("architectures") or [""])[0]).endswith(("ForCausalLM", "LMHeadModel")):
        heads = _first(config, "num_attention_heads", "n_head") or 1
        kv_heads = _first(config, "num_key_value_heads") or heads
        layers = _first(config, "num_hidden_layers", "n_layer")
        head_size = _first(config, "head_dim") or hidden // heads
        activations += batch_tokens * 2 * layers * kv_heads * head_size * cell
    return Memory(weights, activations, CUDA_OVERHEAD_BYTES if part.kind == "cuda" else 0)


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def _revision(spec: Spec) -> Iterator[Finding]:
    revision = spec.model.revision
    if revision and _COMMIT.fullmatch(revision):
        return
    what = "the model's revision floats" + (f": {revision!r} is no commit" if revision else "")
    why = f"{spec.model.source} can change between two builds of the same spec"
    hint = "`inferctl pin` writes today's commit into the spec; or set model.revision to the commit you tested"
    if spec.model.weights != "mount":
        hint += "; `inferctl build --allow-floating` builds anyway"
    yield Finding("warn", "revision", what, why, hint)


def _base_digest(spec: Spec, base: BaseImage) -> Iterator[Finding]:
    reference = spec.image.base_image or base.reference
    if "@sha256:" not in reference and not (base.digest and not spec.image.base_image):
        why = "the tag can be moved or deleted"
        hint = "`inferctl pin` writes its digest into the spec; or set image.base_image to your mirror with a digest"
        yield Finding("warn", "base.digest", f"{reference} is not pinned by digest", why, hint)


def _end_of_life(base: BaseImage, today: datetime.date) -> Iterator[Finding]:
    if base.end_of_life is None:
        why = base.notes.get("end_of_life", "not recorded")
        yield Finding("ok", "base.end_of_life", f"{base.key}: end of life unknown", why)
        return
    end, note = base.end_of_life, base.notes.get("end_of_life", "")
    hint = "mirror the image (image.base_image), or take a newer base: `inferctl catalog bases`"
    if today >= end:
        why = f"NVIDIA deletes tags six months after; {note}" if base.cuda else note
        yield Finding("warn", "base.end_of_life", f"{base.key} is past its end of life, {end}", why, hint)
    elif today >= end - datetime.timedelta(days=180):
        yield Finding("warn", "base.end_of_life", f"{base.key} ends on {end}", note, hint)
    else:
        yield Finding("ok", "base.end_of_life", f"{base.key} is maintained until {end}", note)


def _platforms(spec: Spec, base: BaseImage, stack: Stack, platforms: tuple[str, ...]) -> Iterator[Finding]:
    for wanted in platforms:
        if wanted not in base.platforms:
            what, known = f"{base.key} does not exist for {wanted}", ", ".join(base.platforms)
            hint = "image.platform or --platform, or another base"
            yield Finding("error", "platform", what, f"it exists for {known}", hint)
        elif wanted not in stack.platforms and not spec.image.locks:
            known = ", ".join(stack.platforms)
            why = f"its lock and its kernel list are those of {known}; aarch64 wheels differ, they have no sm_75"
            yield Finding(
                "error", "platform", f"{stack.key} is not locked for {wanted}", why, "image.locks: your own lock"
            )
    if len(platforms) > 1 and spec.image.locks:
        why = "a lock is resolved for one platform: a package that another one needs is not in it"
        hint = "build each platform with its own image.locks and --platform"
        yield Finding("warn", "platform", f"one lock for {len(platforms)} platforms", why, hint)


def _python(base: BaseImage, stack: Stack) -> Iterator[Finding]:
    if base.python.version not in stack.python:
        why = f"its wheels are for Python {', '.join(stack.python)}"
        hint = "`inferctl catalog stacks` lists what goes together"
        yield Finding("error", "python", f"{stack.key} has no wheel for Python {base.python.version}", why, hint)


def _cuda_twice(base: BaseImage, stack: Stack) -> Iterator[Finding]:
    twice = [name for name in base.ships if name in _IN_WHEELS]
    if twice and stack.cuda is not None and "torch" not in base.provides:
        what = f"the image ships CUDA twice: the base {base.key} has {', '.join(twice)}"
        why = "torch's wheels bring their own copies and load those, so the base's are 1-3 GB that nothing uses"
        yield Finding("warn", "base.cuda_twice", what, why, "take a `-base` tag, as in `inferctl catalog bases`")


def _level(precision: str, part: Hardware) -> tuple[Level | Literal["depends"], str]:
    if part.kind == "cpu" and precision != "fp32":
        needs = {"bf16": "avx512_bf16 or amx_bf16", "fp16": "avx512_fp16 or amx_fp16", "int8": "VNNI or AMX"}[precision]
        return "depends", f"native on a processor with {needs}, otherwise emulated and slow"
    how = support(precision, part.traits)
    return how.level, how.reason


def _precision(precision: str, level: Level | Literal["depends"], reason: str, part: Hardware) -> Iterator[Finding]:
    if level == "depends":
        what, hint = f"{precision} depends on the processor", "`inferctl doctor` says what this machine has"
        yield Finding("warn", "precision", what, reason, hint, part.key)
        return
    if level == "unsupported":
        better = f"serve.precision: {best_precision(part.traits)}"
        yield Finding("error", "precision", f"{precision} does not run", reason, better, part.key)
    elif level == "emulated":
        better = f"serve.precision: {best_precision(part.traits)}, or auto to choose for each part"
        yield Finding("warn", "precision", f"{precision} is emulated", reason, better, part.key)
    else:
        yield Finding("ok", "precision", f"{precision} is native", reason, None, part.key)
    if precision == "int8" and level == "native":
        what = "int8 saves memory, not time"
        why = (
            "LLM.int8 halves the weights; it was slower than fp16 or bf16 wherever it was measured (T4: 2.5x, A100: 5x)"
        )
        hint = f"for speed: serve.precision: {best_precision(part.traits)}"
        yield Finding("ok", "int8", what, why, hint, part.key)


def _kernels(stack: Stack, kernels: bool | None, part: Hardware) -> Iterator[Finding]:
    if part.kind == "cpu":
        if stack.cuda:
            why = f"{stack.key} carries CUDA {stack.cuda}, which a CPU never uses"
            yield Finding("warn", "kernels", "the image is larger than it need be", why, "image.base: cpu", part.key)
        return
    if not stack.cuda:
        why = f"{stack.key} is built without CUDA: the GPU would stay idle"
        yield Finding(
            "error", "kernels", "the stack has no CUDA", why, "a base with CUDA: `inferctl catalog bases`", part.key
        )
        return
    built = ", ".join(stack.sm) or "none known"
    ptx = {True: "PTX", False: "no PTX", None: "PTX unknown"}[stack.ptx]
    why = f"{stack.key} is built for compute capability {built} ({ptx}); the part is {part.compute_capability}"
    if kernels:
        yield Finding("ok", "kernels", "the stack has kernels", why, None, part.key)
    elif kernels is None:
        hint = "try it there, or take a base whose list is complete: `inferctl catalog stacks`"
        yield Finding("warn", "kernels", "not known whether the stack has kernels", why, hint, part.key)
    else:
        hint = "another base: `inferctl catalog stacks` shows each one's kernels"
        yield Finding("error", "kernels", f"{stack.key} has no kernels for it", why, hint, part.key)


def judge_driver(base: BaseImage, stack: Stack, gpu: drivers.Gpu, driver: int) -> drivers.Verdict | None:
    """Whether `driver` runs images of `base` with `stack` on `gpu`; None for images without CUDA."""
    image = catalog.image_of(base, stack)
    return drivers.judge(image, gpu, driver, catalog.cuda_of_driver(driver)) if image else None


def _driver(base: BaseImage, stack: Stack, part: Hardware, driver: int | None) -> Iterator[Finding]:
    image = catalog.image_of(base, stack)
    if part.kind == "cpu" or image is None:
        return
    gpu = catalog.gpu_of(part)
    if driver is None:
        hint = "`nvidia-smi` on a node shows its driver; `inferctl check --driver 535` judges by one"
        why = f"{stack.key} is built for CUDA {stack.cuda}"
        yield Finding("ok", "driver", drivers.needs(image, gpu), why, hint, part.key)
        return
    verdict = drivers.judge(image, gpu, driver, catalog.cuda_of_driver(driver))
    yield Finding(verdict.level, "driver", verdict.what, verdict.why, verdict.hint, part.key)


def _memory(need: Memory | UnknownSize, part: Hardware) -> Finding:
    if isinstance(need, UnknownSize):
        return Finding("warn", "memory", "memory not checked", need.why, need.hint, part.key)
    sizes = (size(part_of_it, 1) for part_of_it in (need.weights, need.activations, need.overhead))
    why = "weights {}, activations of one full batch {}, CUDA itself {}".format(*sizes)
    if part.memory_bytes is None:
        what = f"needs about {size(need.total, 1)}, estimated"
        return Finding("ok", "memory", what, f"{why}; the profile has no memory size", None, part.key)
    what = f"needs about {size(need.total, 1)} of {size(part.memory_bytes, 1)}, estimated"
    if need.total > part.memory_bytes:
        hint = "int8, a smaller serve.max_batch_tokens, or a part with more memory"
        return Finding("error", "memory", f"does not fit: {what}", why, hint, part.key)
    if need.total > _FULL * part.memory_bytes:
        return Finding("warn", "memory", f"tight: {what}", why, "a smaller serve.max_batch_tokens", part.key)
    return Finding("ok", "memory", what, why, None, part.key)


def _slice(part: Hardware) -> Iterator[Finding]:
    if not part.mig:
        return
    compute, memory_share = part.mig.compute_share, part.mig.memory_fraction
    what = f"{compute:.1%} of the GPU's compute, {memory_share:.1%} of its memory"
    why = f"{part.mig.sms} of {part.mig.parent_sms} multiprocessors; bandwidth is taken as the memory's share, not measured"
    misleading = memory_share - compute > 0.05
    hint = "size it by its compute, not by its name" if misleading else None
    yield Finding("ok", "slice", what, why, hint, part.key)
