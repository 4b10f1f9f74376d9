"""Compare estimates for this machine with measurements.

    python benchmarks/calibration/here.py [--model DIR] [--precision bf16] [--json FILE]

The script calibrates with the batch latency model of this machine: four users send requests of 1 to 48 texts, so that
batches differ in size, and `GET /info` then has the cost of a batch. It predicts p50 and p99 of single texts at 50% and
80% of the saturated rate of the simulated server, and measures them with `inferctl bench --url` at the same rates. The
load generator and the server share the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inferctl.bench.plan import workload
from inferctl.estimate import lengths
from inferctl.estimate.cost import Cost
from inferctl.estimate.forecast import Scenario

ROOT = Path(__file__).resolve().parents[2]
SHARES = (0.5, 0.8)
PLAN = """name: here
configurations: [{{name: here, precision: bf16}}]
load: {{mode: open, rate: {rate}, duration_s: {seconds}, warmup_s: 6}}
corpus: {corpus}
seed: {seed}
quality: null
"""


@contextmanager
def server(model: Path, precision: str, folder: Path) -> Iterator[str]:
    """Start `inferctl serve` on a free port and yield its URL."""
    announce = folder / "announce.json"
    command = [
        sys.executable,
        "-m",
        "inferctl",
        "serve",
        "--model",
        str(model),
        "--name",
        "here",
        "--precision",
        precision,
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--announce", str(announce)], stderr=log
        )
        try:
            while not announce.exists():
                if process.poll() is not None:
                    raise SystemExit(f"the server ended: {(folder / 'server.log').read_text()[-2000:]}")
                time.sleep(0.2)
            yield str(json.loads(announce.read_text())["url"])
        finally:
            process.terminate()
            process.wait(30)


def request_json(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


def pace(url: str, texts: list[str], seconds: float) -> Cost:
    """Return the cost of a batch that the server reports after `seconds` of requests of many sizes."""
    end = time.monotonic() + seconds

    def user(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            some = [f"{draw.randrange(10**6):06d} {draw.choice(texts)}" for _ in range(draw.randint(1, 48))]
            request_json(f"{url}/v1/embeddings", {"model": "here", "input": some, "encoding_format": "base64"})

    users = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    reported = request_json(f"{url}/info")["pace"]
    return Cost(reported["fixed_s"], 1 / reported["tokens_per_s"])


def measure(url: str, rate: float, seconds: float, corpus: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return the row of a benchmark at `rate` requests/s."""
    plan = folder / "here.yaml"
    plan.write_text(PLAN.format(rate=round(rate, 2), seconds=seconds, corpus=corpus, seed=seed))
    command = [sys.executable, "-m", "inferctl", "bench", "--plan", str(plan), "--url", f"here={url}", "--json"]
    done = subprocess.run([*command, "-o", str(folder)], stdout=subprocess.PIPE, text=True, check=False)
    return dict(json.loads(done.stdout)["rows"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "all-MiniLM-L6-v2")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--corpus", default="mixed")
    parser.add_argument("--seconds", type=float, default=30, help="duration of each measured run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts, _ = workload.read_corpus(options.corpus)
    tokens, _ = lengths.of_texts([f"100000 {text}" for text in texts], options.model / "tokenizer.json", 512)
    lines = []
    with tempfile.TemporaryDirectory() as name, server(options.model, options.precision, Path(name)) as url:
        info = request_json(f"{url}/info")
        limit = int(info["limits"]["max_batch_tokens"])
        cost = pace(url, texts, 20)
        simulated = Scenario(tokens, batch_tokens=limit, slots=int(info["parallel_batches"])).server(cost)
        most = simulated.offline().per_second
        print(
            f"batch latency: {cost.fixed * 1000:.2f} ms per batch and {1 / cost.per_token:,.0f} tokens/s; "
            f"simulated at saturation: {most:.0f} texts/s"
        )
        for number, share in enumerate(SHARES):
            estimated = simulated.open(share * most)
            row = measure(url, share * most, options.seconds, options.corpus, Path(name), number)
            line = {"share": share, "rate": share * most, "valid": row["valid"], "reasons": row["reasons"]}
            for key, q in (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99)):
                line[key] = {
                    "estimated": estimated.percentile(q) * 1000,
                    "measured": row[key],
                    "interval": row.get(f"{key[:3]}_interval_ms"),
                }
            lines.append(line)
    report(lines)
    if options.json:
        pace_of = {"fixed_s": cost.fixed, "tokens_per_s": 1 / cost.per_token, "saturated_texts_per_s": most}
        options.json.write_text(json.dumps({"pace": pace_of, "runs": lines}, indent=1) + "\n")


def report(lines: list[dict[str, Any]]) -> None:
    print("\n| load | rate/s | figure | estimated, ms | measured, ms | error |\n|---|---|---|---|---|---|")
    for line in lines:
        for key in ("p50_ms", "p90_ms", "p99_ms"):
            estimated, measured = line[key]["estimated"], line[key]["measured"]
            shown = "not enough samples" if measured is None else f"{measured:.1f}"
            error = "" if measured is None else f"{estimated / measured - 1:+.0%}"
            print(f"| {line['share']:.0%} | {line['rate']:.0f} | {key[:3]} | {estimated:.1f} | {shown} | {error} |")
        if not line["valid"]:
            print(f"INVALID at {line['share']:.0%}: {'; '.join(line['reasons'])}")


if __name__ == "__main__":
    main()
