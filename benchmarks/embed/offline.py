"""Compare `inferctl embed` with what other libraries do with millions of texts: texts/s, memory, recall next to fp32.

    python benchmarks/embed/offline.py [--short 8000] [--long 1000] [--rounds 2] [--json FILE]

The texts of log-normal length have 20 tokens on average (short) and 160 (long). Each contender tokenizes and embeds all
of them in its own process, interleaved A B C C B A. `inferctl embed` is the computer of the command, with its engine
process, without reading and writing files. `inferctl` is its engine in the process that measures, in batches in the
order of the texts, as benchmarks/peers/engine.py has it: the limit. CPU seconds are shown in addition, because other
work on the machine affects them least. Memory is the most that was seen while texts were computed. Both are of all
processes of a contender. Vectors are compared on the first texts of each kind.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))

import engine
import numpy as np
import peers

KINDS = {"short": 20, "long": 160}  # tokens on average
CONTENDERS = (
    "inferctl embed bf16",
    "inferctl bf16",
    "sentence-transformers bf16",
    "openvino bf16",
    "infinity torch bf16",
    "fastembed fp32",
    "inferctl embed int8",
    "fastembed int8",
)
COMPARED = 500  # texts of each kind whose vectors are compared with fp32


def measure(contender: engine.Contender) -> tuple[float, float, float]:
    """Return the seconds, the CPU seconds and the most memory (PSS, MB) of its processes for all texts."""
    pid, done, memory = contender.process.pid, threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(OSError):  # a process ended while it was read
                memory.append(peers.pss_mb(pid))

    watching = threading.Thread(target=watch)
    watching.start()
    before = peers.cpu_s(peers.processes(pid))
    contender.measure()
    cpu = peers.cpu_s(peers.processes(pid)) - before
    done.set()
    watching.join()
    return contender.wall[-1], cpu, max(memory)


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--short", type=int, default=8000, help="number of short texts")
    parser.add_argument("--long", type=int, default=1000, help="number of long texts")
    parser.add_argument("--only", nargs="*", default=CONTENDERS, help="contenders; the first one is the baseline")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for kind, tokens in KINDS.items():
        texts = peers.texts(getattr(options, kind), tokens)
        print(f"\n{len(texts)} {kind} texts of about {tokens} tokens")
        figures[kind] = {"texts": len(texts)} | compare(texts, options)
    peers.write(options.json, figures)


def compare(texts: list[str], options: Any) -> dict[str, Any]:
    """Measure all contenders with these texts, print and return their figures by name."""
    reference = peers.fp32(texts[:COMPARED])
    running: list[tuple[engine.Contender, list[tuple[float, float, float]]]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps({"texts": texts, "compared": texts[:COMPARED]}))
        try:
            for name in options.only:
                exported = name.startswith("fastembed")
                model = peers.onnx(name.split()[-1]) if exported else peers.MODEL
                running.append((engine.start(name, file, model), []))
            for contender, results in peers.order(running, options.rounds):
                results.append(measure(contender))
                print(contender.name, *(f"{each:.4g}" for each in results[-1]), file=sys.stderr)
        finally:
            for contender, _ in running:
                peers.send(9, peers.processes(contender.process.pid))
    figures: dict[str, Any] = {}
    for contender, results in running:
        wall, cpu, memory = zip(*results, strict=True)
        ratios = [[a[n] / b[n] for a, b in zip(results, running[0][1], strict=True)] for n in (0, 1)]
        figures[contender.name] = {
            "texts_per_second": len(texts) / peers.median(wall),
            "first_is": peers.median(ratios[0]),
            "by_cpu": peers.median(ratios[1]),
            "cpu_ms_per_text": 1000 * peers.median(cpu) / len(texts),
            "pss_mb": max(memory),
            **peers.quality(np.array(contender.vectors), reference),
            "by_round": ratios,
        }
    head = ("contender", "texts/s", "first is x", "by CPU x", "CPU ms", "PSS MB", "cosine min", "mean", "recall@10")
    peers.table(head, [(name, *list(found.values())[:-1]) for name, found in figures.items()])
    return figures


if __name__ == "__main__":
    main()
