"""Compares `inferctl embed --ray` with a local run: on a cluster of three nodes, one of which is killed, and on one node.

    python benchmarks/embed/ray_cluster.py models/all-MiniLM-L6-v2 [--rows 60000] [--rounds 2]

It needs `pip install '.[serve,ray]'`, and starts a cluster on this machine: a node is a raylet with workers of its own.
The node is killed when a third of the ranges is done. The overhead is that of one node with all cores, interleaved with
local runs: of the seconds in which ranges are computed, and of whole commands.
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

from ray.cluster_utils import Cluster


def embed(folder: Path, model: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "inferctl", "embed", str(folder.parent / "texts.jsonl"), "--model", str(model)]
    command += ["--output", str(folder), "--range-rows", "1000", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, float | str]:
    """Return output_sha256 and wall_s of the receipt, and the seconds until now."""
    document = json.loads(process.communicate()[0])
    assert document.get("complete"), document
    return document["receipt"]


def cluster_of(nodes: int, cores: int) -> tuple[Cluster, list[object]]:
    store = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    return cluster, [cluster.add_node(num_cpus=cores, **store) for _ in range(nodes)]


def with_a_death(root: Path, model: Path) -> None:
    cluster, nodes = cluster_of(3, 1)
    folder = root / "death"
    process, total = embed(folder, model, "--ray", cluster.address), 0
    while process.poll() is None and nodes:
        done = len(list(folder.glob("part-?????.json")))
        total = len(json.loads((folder / "manifest.json").read_bytes())["ranges"]) if done else 0
        if done and done >= total / 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print(f"killed a node of three after {done} of {total} ranges", flush=True)
        time.sleep(0.2)
    found = finished(process)
    workers = {json.loads(each.read_bytes())["worker"] for each in folder.glob("part-?????.json")}
    print(f"three nodes, one killed: {found['output_sha256']}, {len(workers)} actors wrote shards", flush=True)
    cluster.shutdown()


def overhead(root: Path, model: Path, rounds: int) -> None:
    cluster, _ = cluster_of(1, os.cpu_count() or 1)
    ratios = []
    for number in range(rounds):
        seconds: dict[str, list[tuple[float, float]]] = {"local": [], "ray": []}
        for place, where in enumerate(("local", "ray", "ray", "local")):
            started = time.monotonic()
            options = ("--ray", cluster.address) if where == "ray" else ()
            found = finished(embed(root / f"{number}-{place}", model, *options))
            seconds[where].append((float(found["wall_s"]), time.monotonic() - started))
            print(f"{where}: {found['output_sha256']}, {found['wall_s']:.1f} s computing", flush=True)
        sums = {where: [sum(each) for each in zip(*pairs, strict=True)] for where, pairs in seconds.items()}
        ratios.append([ray / local for ray, local in zip(sums["ray"], sums["local"], strict=True)])
    for what, values in zip(("computing", "whole command"), zip(*ratios, strict=True), strict=True):
        print(f"{what}: Ray takes {statistics.median(values) - 1:+.1%} (rounds: {[f'{v - 1:+.1%}' for v in values]})")
    cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    draw = random.Random(7)
    words = ["river", "market", "signal", "paper", "window", "engine", "cloud", "garden", "number", "music"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (root / "texts.jsonl").open("w") as file:
            for number in range(given.rows):
                text = " ".join(draw.choices(words, k=draw.randint(3, 40))) + f" {number}"
                file.write(json.dumps({"id": f"t{number}", "text": text}) + "\n")
        found = finished(embed(root / "local", given.model))
        print(f"local: {found['output_sha256']}", flush=True)
        with_a_death(root, given.model)
        overhead(root, given.model, given.rounds)


if __name__ == "__main__":
    main()
