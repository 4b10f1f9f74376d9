"""Fixtures shared by all tests: the real model, the real Docker Engine, golden files."""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import tiny_models
from tests.processes import ServerProcess, execute, python, start, until
from tests.required import absent_package, missing

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# A background job of a shell ignores SIGINT, and its child processes inherit that. Tests interrupt their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"
SPLADE = ROOT / "models" / "splade-tiny"
BRIDGE = "inferctl-ci0"
# pytest rewrites the assertions of all test files on each start, unless it can keep the result.
sys.dont_write_bytecode = False
TEXTS = [
    "Which river flows through Vienna?",
    "The Danube\nflows through Vienna.",
    "int main(void) { return 0; }",
    "ok",
    "naïve café, 北京, 🚀 " * 30,
    "a long text that will be truncated " * 100,
]
# Other load on the machine must not fail a test, so none has a deadline.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
# Tests run in parallel, and OpenMP threads that spin while they wait would take cores from each other. torch reads this
# when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="Update the golden files instead of comparing with them."
    )


@cache
def _uses_torch(file: Path) -> bool:
    """Whether a module of tests imports torch, which takes 2 to 5 s of CPU time in each worker."""
    return bool(re.search(r"^\s*(import|from) (torch|transformers|sentence_transformers)\b", file.read_text(), re.M))


def pytest_itemcollected(item: pytest.Function) -> None:
    """Choose the tests that run in one worker, and skip slow measurements unless `-m` names their marker.

    Tests that use the Docker Engine run in one worker, because BuildKit merges equal steps of concurrent builds. Those
    that share a server or a fixture of their module do too, so that it starts once; and those of a folder that use
    torch in the process of the tests.
    """
    if not item.get_closest_marker("xdist_group"):
        fixtures = item._fixtureinfo.name2fixturedefs
        if item.get_closest_marker("docker"):
            item.add_marker(pytest.mark.xdist_group("docker"))
        elif server := {"minilm_server", "echo"} & fixtures.keys():
            item.add_marker(pytest.mark.xdist_group(server.pop().removesuffix("_server")))
        elif _uses_torch(item.path):
            item.add_marker(pytest.mark.xdist_group(f"torch in {item.path.parent.name}"))
        elif "postgres" in fixtures or any(found[-1].scope == "module" for found in fixtures.values()):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    if item.get_closest_marker("slow_measurement") and "slow_measurement" not in item.config.option.markexpr:
        item.add_marker(pytest.mark.skip(reason="takes minutes; `make nightly` runs it"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Skip a test that needs a package that is not installed."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    if call.excinfo and (problem := absent_package(str(call.excinfo.value))):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {problem}")
    return report  # type: ignore[return-value]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Skip a module that imports a package that is not installed."""
    report: pytest.CollectReport = yield  # type: ignore[misc, assignment]
    if report.failed and (problem := absent_package(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {problem}")
    return report  # type: ignore[return-value]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run groups with slow tests first, then slow tests, other groups and the rest: at the end, no worker waits long.

    With `--no-loadscope-reorder`, xdist keeps this order.
    """
    slow = {_group(item) for item in items if item.get_closest_marker("slow")} - {None}
    items.sort(
        key=lambda item: (
            _group(item) not in slow and item.get_closest_marker("slow") is None,
            _group(item) is None,
        )
    )


def _group(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("xdist_group")
    return marker.args[0] if marker else None


@pytest.fixture(scope="session", autouse=True)
def _without_user_settings() -> None:
    """Remove the settings of the developer from the environment of the tests."""
    for variable in [v for v in os.environ if v.startswith("INFERCTL_") and v != "INFERCTL_REQUIRE"]:
        del os.environ[variable]
    os.environ["COLUMNS"] = "80"
    os.environ["NO_COLOR"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Without bytecode, each of the hundreds of processes compiles the package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # With spinning torch threads, two workers compete for the cores and are many times slower.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@contextmanager
def one_worker(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Let one worker of xdist at a time do this. Yields the folder that all workers share."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def _model(folder: Path, factory: pytest.TempPathFactory) -> Path:
    """Return a folder of `make model`. Downloads the model if a test is the first that needs it."""
    with one_worker(factory, folder.name):
        if not (folder / "model.safetensors").is_file():
            python(ROOT / "benchmarks" / "fetch_model.py", folder, code=0)
    return folder


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    return _model(MODEL, tmp_path_factory)


@pytest.fixture(scope="session")
def splade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a real small SPLADE."""
    return _model(SPLADE, tmp_path_factory)


@pytest.fixture(scope="session")
def cross_encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small cross-encoder with random weights and MiniLM's tokenizer, readable by every user."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross-encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = BertConfig.from_pretrained(minilm, num_labels=1, initializer_range=0.3, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def gpu() -> None:
    """Require a CUDA GPU. Skips without one, or fails with INFERCTL_REQUIRE=gpu."""
    import torch

    if not torch.cuda.is_available():
        missing("gpu", "no CUDA GPU found")


@pytest.fixture(scope="session")
def engine() -> None:
    """Require a Docker Engine with buildx. Skips without one, or fails with INFERCTL_REQUIRE=docker."""
    problem = None
    if not shutil.which("docker"):
        problem = "docker command not found"
    elif subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        problem = "the Docker Engine does not respond"
    elif subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        problem = "docker has no buildx plugin"
    if problem:
        missing("docker", problem)


@pytest.fixture(scope="session")
def exporting_engine(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Socket of a second Docker Engine with the containerd store, which exports caches and attaches provenance.

    Tests that use it have the xdist group `ci`, so that it starts once.
    """
    folder = tmp_path_factory.mktemp("engine")
    config = folder / "daemon.json"
    config.write_text(json.dumps({"features": {"containerd-snapshotter": True}}))
    socket = folder / "engine.sock"
    subprocess.run(["ip", "link", "add", "name", BRIDGE, "type", "bridge"], check=False, capture_output=True)
    subprocess.run(["ip", "addr", "add", "172.30.98.1/24", "dev", BRIDGE], check=False, capture_output=True)
    subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True, capture_output=True)
    command = ["dockerd", "--config-file", str(config), "--data-root", str(folder / "data"), "--bridge", BRIDGE]
    command += ["--exec-root", str(folder / "exec"), "--pidfile", str(folder / "engine.pid"), "-H", f"unix://{socket}"]
    command += ["--iptables=false", "--ip6tables=false", "--ip-masq=false"]
    log = (folder / "engine.log").open("w")
    daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: socket.exists() or daemon.poll() is not None)
        execute("docker", "-H", f"unix://{socket}", "info", code=0)
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(60)
        log.close()
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)
        shutil.rmtree(folder / "data", ignore_errors=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a golden file, as in `golden("name.txt", text)`, or write it with --update-golden."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"golden file {name} not found: run `make golden` and read the result"
        assert text == file.read_text(encoding="utf-8"), f"differs from tests/golden/{name}; `make golden` updates it"

    return check


@pytest.fixture(scope="session")
def base_image(engine: None) -> str:
    """Digest reference of the base image (Debian with Python 3.11) that `.ci/stand-in-base` builds and pushes."""
    name = "localhost:5000/base:trixie-python3.11"
    done = execute("docker", "image", "inspect", "--format", "{{index .RepoDigests 0}}", name)
    if done.returncode:
        hint = f"build it with `.ci/stand-in-base {name}` (as root, with a registry at localhost:5000)"
        missing("docker", f"image {name} not found: {hint}")
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of wheels that replaces the package index: the versions of the shipped CPU locks, for this Python.

    The first worker that needs it downloads them for all workers.
    """
    from inferctl.facts import catalog
    from inferctl.image import locks

    shipped = locks.load(catalog.base("cpu"), None, int8=False, embed=True)
    pins = shipped.versions()
    # Resolving also requires the packages that the locks leave out.
    wanted = [f"torch=={pins['torch']}", *locks.declared_requirements("serve")]
    wanted += locks.declared_requirements("wordpiece") + locks.declared_requirements("embed")
    with one_worker(tmp_path_factory, "wheels") as root:
        folder, incomplete, constraints = root / "wheels", root / "wheels-incomplete", root / "pins.txt"
        if not folder.exists():
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--dest", str(incomplete), "--constraint", str(constraints)]
            subprocess.run([*command, *wanted], check=True)
            incomplete.rename(folder)
    return folder


def _serving(folder: Callable[[], Path]) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def run(*arguments: str, place: Path | None = None, **environment: str) -> ServerProcess:
        started.append(start(place or folder(), *arguments, **environment))
        return started[-1]

    yield run
    for server in started:
        server.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`serve("--model", ...)` starts a server for one test, in the folder `place` if it names one."""
    yield from _serving(lambda: tmp_path)


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """`serve_module("--model", ...)` starts a server for all tests of a module."""
    yield from _serving(lambda: tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def echo(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the echo engine, a small queue and an SLO. Only the model is not real."""
    arguments = ("--model", str(minilm), "--engine", "echo", "--name", "echo", "--max-queue-tokens", "64")
    server = start(tmp_path_factory.mktemp("echo"), *arguments, INFERCTL_SLO_P99_MS="70000")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def minilm_server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the real model in fp32."""
    arguments = ("--model", str(minilm), "--precision", "fp32", "--name", "minilm")
    server = start(tmp_path_factory.mktemp("minilm"), *arguments)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def minilm_reference(minilm: Path) -> dict[str, Any]:
    """The output of the reference implementation for TEXTS."""
    command = [sys.executable, "-m", "inferctl.serve.reference", str(minilm)]
    done = subprocess.run(command, input=json.dumps(TEXTS).encode(), capture_output=True, check=True)
    output: dict[str, Any] = json.loads(done.stdout)
    return output


@pytest.fixture(scope="module")
def tiny(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("bert", "mean_tokens")` returns a folder with a small random model of that architecture."""
    return lambda architecture, pooling, normalize=True: tiny_models.make(
        minilm, tmp_path_factory.mktemp(architecture), architecture, pooling, normalize
    )
