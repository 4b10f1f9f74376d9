"""Compare the engine, in-process, with CrossEncoder of sentence-transformers: pairs/s and the difference of the scores.

    python benchmarks/peers/rerank.py [--requests 16] [--rounds 6] [--json FILE]

The model is a BERT cross-encoder of the size of all-MiniLM-L6-v2, with its tokenizer and random weights. A request is a
query with 32 documents of log-normal length (mean 55 tokens), and requests run one after the other. Each contender runs
in its own process, interleaved A B C D D C B A. Differences are those of the scores, from 0 to 1, to fp32.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import engine
import numpy as np
import peers

CONTENDERS = (
    "inferctl bf16",
    "inferctl int8",
    "inferctl fp32",
    "sentence-transformers bf16",
    "sentence-transformers fp32",
)
DOCUMENTS = 32


def make_model(folder: Path) -> None:
    """Write the cross-encoder into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    # With the usual range of 0.02, all scores are nearly equal.
    config = AutoConfig.from_pretrained(peers.MODEL, num_labels=1, initializer_range=0.06)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(peers.MODEL / name, folder)


def requests(count: int) -> list[tuple[str, list[str]]]:
    """Return queries of eight words, each with its documents."""
    documents, queries = peers.texts(count * DOCUMENTS), peers.texts(count, seed=9)
    parts = [documents[start : start + DOCUMENTS] for start in range(0, len(documents), DOCUMENTS)]
    return [(" ".join(query.split()[:8]), part) for query, part in zip(queries, parts, strict=True)]


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=16)
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    sent = requests(options.requests)
    pairs = [(query, document) for query, documents in sent for document in documents]
    running: list[engine.Contender] = []
    with tempfile.TemporaryDirectory() as temporary:
        model, file = Path(temporary) / "model", Path(temporary) / "requests.json"
        make_model(model)
        file.write_text(json.dumps({"requests": sent}))
        completed = subprocess.run(
            [sys.executable, "-m", "inferctl.serve.reference", str(model)],
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            check=True,
        )
        reference = np.array(json.loads(completed.stdout)["scores"])
        try:
            running.extend(engine.start(name, file, model) for name in CONTENDERS)
            for contender in peers.order(running, options.rounds):
                contender.measure()
        finally:
            for contender in running:
                contender.process.kill()
    baseline, rows, figures = running[0], [], {}
    for contender in running:
        rate = len(pairs) / peers.median(contender.wall)
        faster = peers.median(contender.wall) / peers.median(baseline.wall)
        cpu = peers.median(contender.cpu) / peers.median(baseline.cpu)
        worst = float(np.abs(contender.vectors - reference).max())
        rows.append((contender.name, rate, faster, cpu, worst))
        figures[contender.name] = {
            "pairs_per_second": rate,
            "inferctl_bf16_is": faster,
            "inferctl_bf16_is_by_cpu_seconds": cpu,
            "score_difference_max": worst,
            "wall": contender.wall,
            "cpu": contender.cpu,
        }
    spread = {"min": float(reference.min()), "max": float(reference.max()), "std": float(reference.std())}
    peers.table(("engine", "pairs/s", "inferctl bf16 is x", "by CPU seconds x", "largest difference"), rows)
    print("fp32 scores: " + ", ".join(f"{name} {value:.4f}" for name, value in spread.items()))
    peers.write(options.json, {"pairs": len(pairs), "documents": DOCUMENTS, "scores": spread, "engines": figures})


if __name__ == "__main__":
    main()
