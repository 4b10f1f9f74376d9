"""`inferctl doctor`: what this machine can do, as a list of checks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inferctl.cli import console
from inferctl.cli.options import Json
from inferctl.errors import InferctlError

if TYPE_CHECKING:
    from rich.table import Table

    from inferctl.bench.measure.environment import Environment, Gpu
    from inferctl.image.buildx import Builder
    from inferctl.precision import DeviceTraits

# A CUDA image with its build cache: torch closure packed and unpacked, base, room for the next build.
_ROOM_FOR_BUILDS = 25_000_000_000


Verdict = Literal["can", "limited", "cannot"]


@dataclass(frozen=True)
class Check:
    """One finding. `can`: works; `limited`: works with a drawback; `cannot`: that part of inferctl is out of reach here."""

    name: str
    verdict: Verdict
    detail: str
    hint: str | None = None


def doctor(as_json: Json = False) -> None:
    """Say what this machine can do: build, push, serve in which precision, benchmark. Always exits 0: nothing here is an error.

    Example: inferctl doctor --json
    """
    from inferctl.bench.measure import environment

    here = environment.detect()
    checks: list[Callable[[Environment], Iterator[Check]]] = [
        _python,
        _docker,
        _registries,
        _disk,
        _gpu,
        _torch,
        precisions,
        _bench,
    ]
    with console.progress("looking at this machine"):
        found = [check for look in checks for check in look(here)]
    if as_json:
        console.document({"checks": [asdict(check) for check in found]})
        return
    console.report(table_of(found))


def table_of(found: list[Check]) -> Table:
    """The checks as a table; what they say is text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    marks = {"can": ("✓", "green"), "limited": ("!", "yellow"), "cannot": ("✗", "red")}
    for check in found:
        told = check.detail + (f"\n→ {check.hint}" if check.hint else "")
        table.add_row(Text(*marks[check.verdict]), Text(check.name), Text(told))
    return table


def _python(here: Environment) -> Iterator[Check]:
    yield Check(
        "machine",
        "can",
        f"{here.cores} cores, {here.memory_bytes / 1e9:.0f} GB memory, {here.cpu_model}, {here.kernel}, Python {here.python}",
    )


def _docker(_: Environment) -> Iterator[Check]:
    from inferctl.image import buildx
    from inferctl.image.docker import DockerEngine

    try:
        info = DockerEngine.connect().info()
    except InferctlError as error:
        yield Check("docker", "cannot", error.message, error.hint)
        return
    gpu = "passes GPUs through" if info.gpu else "passes no GPU through (no NVIDIA container toolkit)"
    yield Check("docker", "can" if info.gpu else "limited", f"Engine {info.version}, {gpu}")
    try:
        builder = buildx.detect(info.containerd_store)
    except InferctlError as error:
        yield Check("build", "cannot", error.message, error.hint)
        return
    yield Check("build", "can", builder.describe())
    yield features(builder)


def features(builder: Builder) -> Check:
    """What the builder can do beyond building for this machine."""
    able = {
        "cache export, OCI archives, several platforms at once, SBOM and provenance": builder.exports,
        "Dockerfile check": builder.checks,
    }
    has, lacks = ([what for what, can in able.items() if can is wanted] for wanted in (True, False))
    told = [f"for {', '.join(builder.platforms)}"] if builder.platforms else []
    told += [f"{word}: {', '.join(names)}" for word, names in (("with", has), ("without", lacks)) if names]
    hint = None if builder.exports else "docker buildx create --use --driver docker-container"
    if builder.exports and not builder.checks:
        hint = "buildx 0.15 or newer checks Dockerfiles"
    return Check("builder", "limited" if lacks else "can", "; ".join(told), hint)


def _registries(_: Environment) -> Iterator[Check]:
    """Registries that Docker's own file has a login for; the credentials themselves are not read."""

    file = Path(os.environ.get("DOCKER_CONFIG", "~/.docker")).expanduser() / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    config = config if isinstance(config, dict) else {}
    kept = {*(config.get("auths") or {}), *(config.get("credHelpers") or {})}
    hosts = sorted("docker.io" if "index.docker.io" in host else host for host in kept)
    if hosts:
        yield Check("registry login", "can", ", ".join(hosts))
    elif config.get("credsStore"):
        yield Check("registry login", "can", f"kept by the credential store {config['credsStore']!r}")
    else:
        yield Check("registry login", "limited", "none: only open registries take a push", "docker login HOST")


def _disk(_: Environment) -> Iterator[Check]:
    place = Path("/var/lib/docker") if Path("/var/lib/docker").is_dir() else Path("/")
    free = shutil.disk_usage(place).free
    roomy = free >= _ROOM_FOR_BUILDS
    yield Check(
        "disk",
        "can" if roomy else "limited",
        f"{free / 1e9:.0f} GB free in {place}",
        None if roomy else "a CUDA image wants about 25 GB while it is built: `docker builder prune` frees old layers",
    )


def _gpu(here: Environment) -> Iterator[Check]:
    for gpu in here.gpus:
        known = gpu.hardware or "not in the catalog"
        yield Check("gpu", "can", f"{gpu.name} ({known}), {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}")
        yield from images(gpu)
    if not here.gpus:
        driver = Path("/proc/driver/nvidia/version").exists()
        missing = "there is a driver, but NVML lists no GPU" if driver else "none: models run on the CPU"
        yield Check("gpu", "limited", missing, "pip install 'inferctl[gpu]'" if driver else None)


def images(gpu: Gpu) -> Iterator[Check]:
    """Which images with CUDA this GPU and its driver run, by base."""
    from inferctl import catalog, drivers, fit

    branch = gpu.driver.partition(".")[0]
    if not branch.isdigit():
        return
    known = catalog.hardware(gpu.hardware) if gpu.hardware else None
    able: dict[str, Verdict] = {"ok": "can", "warn": "limited", "error": "cannot"}
    device = (
        catalog.cuda_gpu_of(known) if known else catalog.cuda_gpu(drivers.brand_of(gpu.name), gpu.compute_capability)
    )
    for base in catalog.bases().values():
        verdict = fit.judge_driver(base, catalog.stack(base.stack), device, int(branch))
        if verdict:
            yield Check(f"base {base.key}", able[verdict.level], f"{verdict.what}: {verdict.why}", verdict.hint)


def _torch(here: Environment) -> Iterator[Check]:
    versions = here.versions
    if "torch" not in versions or "transformers" not in versions:
        yield Check(
            "serve",
            "cannot",
            "torch and transformers are not installed (rendering and building do not need them)",
            "pip install 'inferctl[serve]'",
        )
        return
    yield Check("serve", "can", f"torch {versions['torch']}, transformers {versions['transformers']}")


def precisions(here: Environment) -> Iterator[Check]:
    """Which precision runs natively on what is here."""
    from inferctl.precision import PRECISIONS, support

    device = _device(here)
    if device is None:
        why = f"{here.gpus[0].name} is not in the catalog, and its driver does not report its compute capability"
        yield Check("precision", "limited", f"not known: {why}", "upgrade the driver")
        return
    verdicts: dict[str, Verdict] = {"native": "can", "emulated": "limited", "unsupported": "cannot"}
    for precision in PRECISIONS:
        result = support(precision, device)
        yield Check(precision, verdicts[result.level], f"{result.level}: {result.reason}")


def _device(here: Environment) -> DeviceTraits | None:
    """What decides the precisions here: the first GPU, or the CPU. None if its compute capability is unknown."""
    from inferctl import catalog
    from inferctl.precision import DeviceTraits, capability_of

    if not here.gpus:
        return DeviceTraits("cpu", cpu_flags=frozenset(here.cpu_flags))
    gpu = here.gpus[0]
    if gpu.hardware:
        return catalog.hardware(gpu.hardware).traits
    capability = gpu.compute_capability
    return DeviceTraits("cuda", capability_of(capability)) if capability else None


def _bench(here: Environment) -> Iterator[Check]:
    if "locust" in here.versions:
        yield Check("bench", "can", f"Locust {here.versions['locust']}")
    else:
        yield Check("bench", "cannot", "Locust is not installed", "pip install 'inferctl[bench]'")
