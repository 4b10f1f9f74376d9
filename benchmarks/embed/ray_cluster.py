"""Compares `inferctl embed --ray` with a local run: on three nodes, one of which is killed, then on one node.

    python benchmarks/embed/ray_cluster.py models/all-MiniLM-L6-v2 [--rows 60000] [--rounds 2]

It needs `pip install '.[serve,ray]'`. A node is a raylet on this machine, with workers of its own. The overhead is that
of one node with all cores, interleaved with local runs: of the seconds from the start of the first range to the end of
the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

STORE = {"object_store_memory": 80_000_000}
WORDS = ["river", "market", "signal", "paper", "window", "engine", "cloud", "garden", "number", "music"]


def start(folder: Path, model: Path, ranges: int, *options: str) -> subprocess.Popen[str]:
    texts = folder.parent / "texts.jsonl"
    command = [sys.executable, "-m", "inferctl", "embed", str(texts), "--model", str(model), "--output", str(folder)]
    command += ["--range-bytes", str(-(-texts.stat().st_size // ranges)), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def seconds_of(process: subprocess.Popen[str], folder: Path, what: str) -> float:
    found = json.loads(process.communicate()[0])["receipt"]
    ranges = [json.loads(file.read_bytes()) for file in folder.glob("part-?????.json")]
    seconds = max(each["finished"] for each in ranges) - min(each["started"] for each in ranges)
    print(f"{what}: {found['output_sha256']}, {seconds:.1f} s, {found['wall_s']:.1f} of them computing", flush=True)
    return float(seconds)


def cluster_of(nodes: int, cores: int) -> tuple[Cluster, list[Any]]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE})
    return cluster, [cluster.add_node(num_cpus=cores, **STORE) for _ in range(nodes)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for option, default in (("--rows", 60_000), ("--ranges", 60), ("--rounds", 2)):
        parser.add_argument(option, type=int, default=default)
    given = parser.parse_args()
    draw = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = (" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(given.rows))
        lines = (json.dumps({"text": text}) for text in texts)
        (root / "texts.jsonl").write_text("\n".join(lines) + "\n")

        cluster, nodes = cluster_of(3, 1)
        process = start(root / "killed", given.model, given.ranges, "--ray", cluster.address)
        while process.poll() is None and len(list((root / "killed").glob("part-?????.json"))) < given.ranges / 3:
            time.sleep(0.2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        seconds_of(process, root / "killed", "three nodes, one killed after a third")
        cluster.shutdown()

        cluster, _ = cluster_of(1, os.cpu_count() or 1)
        ratios = []
        for number in range(given.rounds):
            seconds: dict[str, float] = {"local": 0.0, "Ray": 0.0}
            for place, where in enumerate(("local", "Ray", "Ray", "local")):
                options = ("--ray", cluster.address) if where == "Ray" else ()
                output = root / f"{number}-{place}"
                seconds[where] += seconds_of(start(output, given.model, given.ranges, *options), output, where)
            ratios.append(seconds["Ray"] / seconds["local"] - 1)
        cluster.shutdown()
        print(f"Ray takes {statistics.median(ratios):+.1%}; rounds: {[f'{ratio:+.1%}' for ratio in ratios]}")


if __name__ == "__main__":
    main()
