"""Compare the engine, in-process, with sentence-transformers and OpenVINO: texts/s and the cosine to fp32.

    python benchmarks/peers/engine.py [--texts 256] [--rounds 6] [--json FILE]
    python benchmarks/peers/engine.py --decoder [--texts 32] [--rounds 4] [--json FILE]

`--decoder` compares a decoder with the shape of Qwen3-Embedding-0.6B and random weights: it attends backwards, and the
vector is that of the last token. Its vocabulary is that of SmolLM2, because speed does not depend on it.

All contenders tokenize and embed the same texts of log-normal length (mean 55 tokens). Each runs in its own process,
interleaved A B C C B A. CPU seconds are shown in addition, because other work on the machine affects them least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers

CONTENDERS = (
    "inferctl bf16",
    "inferctl int8",
    "sentence-transformers bf16",
    "openvino bf16",
    "openvino int8",
)


DECODER_CONTENDERS = ("inferctl bf16", "sentence-transformers bf16", "inferctl fp32", "sentence-transformers fp32")
DECODER_SHAPE = {  # from the published config.json of Qwen3-Embedding-0.6B
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
}


def write_decoder(folder: Path) -> None:
    """Write the model of `--decoder` as sentence-transformers does."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    tokenizer = AutoTokenizer.from_pretrained(peers.ROOT / "models" / "SmolLM2-135M-Instruct")
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(**DECODER_SHAPE, vocab_size=len(tokenizer))).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    modules = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
        for number, (module, path) in enumerate(zip(modules, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8192}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": DECODER_SHAPE["hidden_size"], "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_mean_tokens": False}))


@dataclass
class Contender:
    """A running process. `wall` and `cpu` are seconds for all texts, one entry per round."""

    name: str
    process: subprocess.Popen[str]
    vectors: Any
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        wall, cpu = json.loads(self.process.stdout.readline())
        self.wall.append(wall)
        self.cpu.append(cpu)


def start(name: str, file: Path, model: Path = peers.MODEL) -> Contender:
    library = name.rpartition(" ")[0]
    interpreter = sys.executable if library in ("inferctl", "transformers") else str(peers.python(library))
    environment = peers.environment()
    log = peers.LOGS / f"{name.replace(' ', '-')}-alone.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [interpreter, str(peers.HERE / "contender.py"), name, str(model), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment,
        )
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit(f"error: {name} did not start\nhint: see {log}")
    return Contender(name, process, np.array(json.loads(line)))


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--decoder", action="store_true", help="a decoder of 0.6B parameters instead of MiniLM")
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = peers.MODEL
        if options.decoder:
            model = Path(folder) / "decoder"
            write_decoder(model)
        compare(model, DECODER_CONTENDERS if options.decoder else CONTENDERS, options, Path(folder) / "texts.json")


def compare(model: Path, contenders: Sequence[str], options: argparse.Namespace, file: Path) -> None:
    """Measure the contenders in turns, and print and write the figures."""
    texts = peers.texts(options.texts)
    completed = subprocess.run(
        [sys.executable, "-m", "inferctl.serve.reference", str(model)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    reference = np.array([peers.decode(row) for row in json.loads(completed.stdout)["embeddings"]])
    running: list[Contender] = []
    file.write_text(json.dumps({"texts": texts, "calibration": peers.texts(128, seed=8)}))
    try:
        running.extend(start(name, file, model) for name in contenders)
        for contender in peers.order(running, options.rounds):
            contender.measure()
    finally:
        for contender in running:
            contender.process.kill()
    baseline, rows, figures = running[0], [], {}
    for contender in running:
        cosines = (contender.vectors * reference).sum(1) / np.linalg.norm(contender.vectors, axis=1)
        rate = len(texts) / peers.median(contender.wall)
        faster = peers.median(contender.wall) / peers.median(baseline.wall)
        cpu = peers.median(contender.cpu) / peers.median(baseline.cpu)
        rows.append((contender.name, rate, faster, cpu, float(cosines.min()), float(cosines.mean())))
        figures[contender.name] = {
            "texts_per_second": rate,
            "inferctl_bf16_is": faster,
            "inferctl_bf16_is_by_cpu_seconds": cpu,
            "cosine_min": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "wall": contender.wall,
            "cpu": contender.cpu,
        }
    peers.table(("engine", "texts/s", "inferctl bf16 is x", "by CPU seconds x", "cosine min", "mean"), rows)
    peers.write(options.json, {"texts": len(texts), "engines": figures})


if __name__ == "__main__":
    main()
