"""Compare `inferctl bench` with `vllm bench serve` on one vLLM server: TTFT, TPOT and output tokens/s.

    python benchmarks/peers/vllm_bench.py VLLM MODEL [--url http://127.0.0.1:8000] [--users 1 8] [--rounds 2]
                                          [--input 128 --output 64] [--seconds 40] [--json FILE]

VLLM is the executable of vLLM in this environment, MODEL a model folder. Without `--url`, the script starts the server,
and ends it. Both tools send completions of equal lengths in closed loops, in the order A B B A. Each run has prompts of
its own, so that no prefix cache responds. `vllm bench serve` sends as many requests as inferctl completed before. The
check passes if the means over the rounds differ by at most 5%.

The tools differ in what they measure: inferctl counts tokens in a window after a warm-up, vLLM's benchmark all tokens
from its start to its last response, with ramp and tail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers

FIGURES = ("ttft_ms", "tpot_ms", "output_tokens_per_s")
LIMIT = 0.05
READY_S = 400.0


@contextlib.contextmanager
def run_server(vllm: str, model: str, port: int, context: int) -> Iterator[str]:
    """Start `vllm serve`, wait until it is ready, and yield its URL. Its processes end with the block."""
    url = f"http://127.0.0.1:{port}"
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, **peers.vllm_environment(Path(folder))}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            limit = time.monotonic() + READY_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > limit:
                    log.seek(0)
                    raise SystemExit(f"vLLM did not start:\n{log.read()[-2000:].decode(errors='replace')}")
                time.sleep(1)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_ready(url: str) -> bool:
    """Return whether the server at `url` responds to GET /health."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


def inferctl(url: str, options: argparse.Namespace, users: int, seed: int) -> dict[str, float]:
    """Measure one run with `inferctl bench`."""
    load = {"users": users, "duration_s": options.seconds, "warmup_s": options.seconds / 2}
    lengths = {"input_tokens": options.input, "output_tokens": options.output}
    plan = {"name": "peer", "load": {**load, "generation": lengths}, "quality": None, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.yaml"
        file.write_text(json.dumps(plan))  # JSON is YAML
        command = [sys.executable, "-m", "inferctl", "bench", "--url", f"vllm={url}/v1/completions", "--json"]
        command += ["--plan", str(file), "--model", options.model, "-o", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.stdout:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout)["rows"][0]
        client = json.loads(Path(row["receipt"]).read_text())["resources"].get("client_cpu_percent")
    found = row["generation"]
    return {
        **{figure: found[figure]["mean"] for figure in FIGURES[:2]},
        "output_tokens_per_s": found["output_tokens_per_s"],
        "requests": row["requests"],
        "failed": row["failed"],
        "input_tokens": found["input_tokens_per_request"],
        "client_cpu_percent": client,
    }


def vllm_bench(url: str, options: argparse.Namespace, users: int, seed: int, requests: int) -> dict[str, float]:
    """Measure one run with `vllm bench serve`."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as metadata:
        environment = {**os.environ, **peers.vllm_environment(Path(metadata))}
        command = [options.vllm, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", options.model]
        command += ["--dataset-name", "random", "--random-input-len", str(options.input), "--seed", str(seed)]
        command += ["--random-output-len", str(options.output), "--num-prompts", str(requests), "--ignore-eos"]
        command += ["--max-concurrency", str(users), "--disable-tqdm", "--temperature", "0"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        file = Path(folder) / "result.json"
        if not file.is_file():
            raise SystemExit(done.stderr[-2000:])
        result = json.loads(file.read_text())
    return {
        "ttft_ms": result["mean_ttft_ms"],
        "tpot_ms": result["mean_tpot_ms"],
        "output_tokens_per_s": result["output_throughput"],
        "requests": result["completed"],
        "failed": requests - result["completed"],
        "input_tokens": result["total_input_tokens"] / max(1, result["completed"]),
    }


def compare(url: str, options: argparse.Namespace, users: int) -> dict[str, Any]:
    """Measure both tools in alternating order. Return the runs, the means and their differences."""
    runs: dict[str, list[dict[str, float]]] = {"inferctl": [], "vllm": []}
    count = 4 * users
    for number in range(options.rounds):
        seed = 1000 * users + number + int(time.time()) % 1000
        for tool in ("inferctl", "vllm") if number % 2 == 0 else ("vllm", "inferctl"):
            if tool == "inferctl":
                runs[tool].append(inferctl(url, options, users, seed))
                # A whole number of requests per user, so that no user waits for the others at the end.
                count = users * max(1, math.ceil(runs[tool][-1]["requests"] / users))
            else:
                runs[tool].append(vllm_bench(url, options, users, seed, count))
            print(f"{users} users, {tool}: {runs[tool][-1]}", flush=True)
    means = {
        tool: {name: sum(run[name] for run in found) / len(found) for name in FIGURES} for tool, found in runs.items()
    }
    differences = {name: means["inferctl"][name] / means["vllm"][name] - 1 for name in FIGURES}
    return {"users": users, "runs": runs, "means": means, "differences": differences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm")
    parser.add_argument("model")
    parser.add_argument("--url")
    parser.add_argument("--port", type=int, default=18551)
    parser.add_argument("--users", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(
            run_server(options.vllm, options.model, options.port, 2 * (options.input + options.output) + 64)
        )
        results = [compare(url, options, users) for users in options.users]
    print(f"{'users':>5} {'figure':<20} {'inferctl':>10} {'vllm bench':>10} {'difference':>10}")
    for result in results:
        for name in FIGURES:
            ours, theirs = (result["means"][tool][name] for tool in ("inferctl", "vllm"))
            difference = result["differences"][name]
            print(f"{result['users']:>5} {name:<20} {ours:>10.2f} {theirs:>10.2f} {difference:>+10.1%}")
    passed = all(abs(value) <= LIMIT for result in results for value in result["differences"].values())
    if options.json:
        lengths = {"input_tokens": options.input, "output_tokens": options.output}
        options.json.write_text(json.dumps({"passed": passed, **lengths, "results": results}, indent=1) + "\n")
    print(f"all means differ by at most {LIMIT:.0%}" if passed else f"at least one mean differs by over {LIMIT:.0%}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
