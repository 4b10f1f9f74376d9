"""Compare `inferctl embed` with what other libraries do with millions of texts: texts/s, memory, recall next to fp32.

    python benchmarks/embed/offline.py [--short 8000] [--long 1000] [--rounds 2] [--json FILE]

The texts of log-normal length have 20 tokens on average (short) and 160 (long). Each contender tokenizes and embeds all
of them in its own process, interleaved A B C C B A. `inferctl embed` is the computer of the command, with its engine
process, without reading and writing files. `inferctl` is its engine in the process that measures, in batches in the
order of the texts, as benchmarks/peers/engine.py has it: the limit. Memory is the largest that was seen while texts were
computed, of all processes of a contender. Vectors are compared on the first texts of each kind.
"""

from __future__ import annotations

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
    "infinity torch bf16",
    "fastembed fp32",
    "inferctl embed int8",
    "fastembed int8",
)
COMPARED = 500  # texts of each kind whose vectors are compared with fp32


class Memory:
    """The largest memory of a process and all below it (PSS, MB), looked at each half second."""

    def __init__(self, pid: int) -> None:
        self.most_mb, self._pid, self._stop = 0.0, pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.most_mb = max(self.most_mb, peers.pss_mb(self._pid))


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
    running: list[tuple[engine.Contender, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps({"texts": texts, "compared": texts[:COMPARED]}))
        try:
            for name in options.only:
                exported = name.startswith("fastembed")
                model = peers.onnx(name.split()[-1]) if exported else peers.MODEL
                running.append((engine.start(name, file, model), []))
            for contender, memory in peers.order(running, options.rounds):
                with Memory(contender.process.pid) as seen:
                    contender.measure()
                memory.append(seen.most_mb)
        finally:
            for contender, _ in running:
                peers.send(9, peers.processes(contender.process.pid))
    first, figures = running[0][0], {}
    for contender, memory in running:
        ratios = [a / b for a, b in zip(contender.wall, first.wall, strict=True)]
        figures[contender.name] = {
            "texts_per_second": len(texts) / peers.median(contender.wall),
            "first_is": peers.median(ratios),
            "first_is_by_round": ratios,
            "pss_mb": max(memory),
            **peers.quality(np.array(contender.vectors), reference),
        }
    keys = ("texts_per_second", "first_is", "pss_mb", "cosine_min", "cosine_mean", "recall_at_10")
    head = ("contender", "texts/s", f"{first.name} is x", "PSS MB", "cosine min", "mean", "recall@10")
    peers.table(head, [(name, *(found[key] for key in keys)) for name, found in figures.items()])
    return figures


if __name__ == "__main__":
    main()
