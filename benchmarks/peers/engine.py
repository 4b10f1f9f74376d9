"""Compare the engine, in-process, with other libraries: texts/s, the cosine and recall next to fp32, memory, start.

    python benchmarks/peers/engine.py [--texts 256] [--rounds 6] [--json FILE]

All contenders tokenize and embed the same texts of log-normal length (mean 55 tokens). Each runs in its own process,
interleaved A B C C B A. CPU seconds are shown in addition, because other work on the machine affects them least. ONNX
files are those of optimum, in int8 quantized with its preset. OpenVINO runs through sentence-transformers in the
precision that it selects for this CPU, and by itself in bf16 and, calibrated by nncf, in int8.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers

CONTENDERS = (
    "inferctl bf16",
    "inferctl int8",
    "sentence-transformers bf16",
    "sentence-transformers onnx fp32",
    "sentence-transformers onnx int8",
    "sentence-transformers openvino auto",
    "openvino bf16",
    "openvino int8",
    "fastembed fp32",
    "fastembed int8",
    "infinity torch bf16",
    "infinity onnx int8",
)


def write_decoder(folder: Path) -> Path:
    """Write SmolLM2-135M as an embedding model of sentence-transformers: the vector is the last token's."""
    shutil.copytree(peers.ROOT / "models" / "SmolLM2-135M-Instruct", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"]}  # where transformers 4 and llama.cpp read it
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers 4 does not know TokenizersBackend
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    modules = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
        for number, (module, path) in enumerate(zip(modules, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8192}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_mean_tokens": False}))
    return folder


@dataclass
class Contender:
    """A running process. `wall` and `cpu` are seconds for all texts, one entry per round."""

    name: str
    process: subprocess.Popen[str]
    vectors: Any
    start_seconds: float
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    pss_mb: float = 0.0

    def measure(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        wall, cpu = json.loads(self.process.stdout.readline())
        self.wall.append(wall)
        self.cpu.append(cpu)


def start(name: str, file: Path, model: Path) -> Contender:
    library = name.rpartition(" ")[0]
    own = library.startswith("inferctl") or library == "transformers"
    interpreter = sys.executable if own else str(peers.python(library))
    environment = peers.environment()
    log = peers.LOGS / f"{name.replace(' ', '-')}-alone.log"
    started = time.monotonic()
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
    process.stdout.readline()
    seconds, line = time.monotonic() - started, process.stdout.readline()
    if not line:
        sys.exit(f"error: {name} did not start\nhint: see {log}")
    return Contender(name, process, np.array(json.loads(line)), seconds)


def measure(names: Sequence[str], file: Path, model: Callable[[str], Path], rounds: int) -> list[Contender]:
    """Start the contenders with the file and their model, measure them in turns, and end them."""
    running: list[Contender] = []
    try:
        running.extend(start(name, file, model(name)) for name in names)
        for contender in peers.order(running, rounds):
            contender.measure()
        for contender in running:
            contender.pss_mb = peers.pss_mb(contender.process.pid)
    finally:
        for contender in running:
            contender.process.kill()
    return running


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, help="contenders; the first one is the baseline")
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    texts = peers.texts(options.texts)
    reference = peers.fp32(texts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps({"texts": texts, "calibration": peers.texts(128, seed=8)}))

        def model(name: str) -> Path:
            exported = " onnx " in name or name.startswith("fastembed")
            return peers.onnx(name.split()[-1]) if exported else peers.MODEL

        running = measure(options.only, file, model, options.rounds)
    baseline, rows, figures = running[0], [], {}
    for contender in running:
        found = peers.quality(contender.vectors, reference)
        figures[contender.name] = {
            "texts_per_second": len(texts) / peers.median(contender.wall),
            "inferctl_bf16_is": peers.median([a / b for a, b in zip(contender.wall, baseline.wall, strict=True)]),
            "by_cpu": peers.median([a / b for a, b in zip(contender.cpu, baseline.cpu, strict=True)]),
            **found,
            "pss_mb": contender.pss_mb,
            "start_seconds": contender.start_seconds,
        }
        rows.append((contender.name, *figures[contender.name].values()))
        figures[contender.name] |= {"wall": contender.wall, "cpu": contender.cpu}
    head = (
        "engine",
        "texts/s",
        "inferctl bf16 is x",
        "by CPU x",
        "cosine min",
        "mean",
        "recall@10",
        "PSS MB",
        "start s",
    )
    peers.table(head, rows)
    peers.write(options.json, {"texts": len(texts), "engines": figures})


if __name__ == "__main__":
    main()
