"""Sparse weights and vectors of tokens next to sentence-transformers, in one process, interleaved.

    python benchmarks/peers/outputs.py [--rounds 3] [--texts 96] [--threads 2]

SPLADE has the shape of distilbert-base (6 layers, width 768, vocabulary of BERT), ColBERT that of MiniLM (6 layers,
width 384, 128 numbers per token), both with random weights. The texts are those of `benchmarks/corpora/mixed.jsonl`.
sentence-transformers encodes them in batches of 32, which it sorts by length. The figure is texts per CPU second, the
median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferctl.reading import task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import mark
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
from inferctl.serve.engines.encoder import EncoderEngine
from inferctl.serve.text.tokenizer_pool import TokenizerPool

ROOT = Path(__file__).resolve().parents[2]
MINILM = ROOT / "models" / "all-MiniLM-L6-v2"
BATCH_TOKENS = 4096


def splade(folder: Path) -> Path:
    """Write a random SPLADE of the shape of distilbert-base."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    DistilBertForMaskedLM(DistilBertConfig(vocab_size=30522)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MINILM, model_max_length=512).save_pretrained(folder / "model")
    transformer = Transformer(str(folder / "model"), transformer_task="fill-mask")
    SparseEncoder(modules=[transformer, SpladePooling()], device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def colbert(folder: Path) -> Path:
    """Write a ColBERT of MiniLM's weights with a random projection."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    token = "token_embeddings"
    dense = Dense(384, 128, bias=False, activation_function=torch.nn.Identity(), module_input_name=token)
    modules = [Transformer(str(MINILM)), dense, MultiVectorMask(), Normalize(token)]
    MultiVectorEncoder(modules=modules, device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def ours(folder: Path, precision: str) -> Callable[[list[str]], Any]:
    """Return what an engine of inferctl computes for texts, tokenization included."""
    config = task_config.read("embed", folder)
    assert isinstance(config, EmbeddingConfig)
    engine = EncoderEngine(EngineConfig(model=str(folder), precision=precision, device="cpu"))
    engine.load()
    pool = TokenizerPool(folder, config, threads=1)

    def run(texts: list[str]) -> Any:
        rows: list[Any] = []
        waiting: list[Any] = []
        for ids in [*pool.encode_now(texts, truncate=True), None]:
            if waiting and (ids is None or sum(map(len, waiting)) + len(ids) > BATCH_TOKENS):
                lengths = np.array([len(each) for each in waiting], np.int32)
                marks = np.full(len(waiting), mark(config.checked), np.int32)
                rows += list(engine.run(Batch(1, np.concatenate(waiting), lengths, marks)).rows)
                waiting = []
            if ids is not None:
                waiting.append(ids)
        return rows

    return run


def theirs(kind: str, folder: Path, dtype: torch.dtype) -> Callable[[list[str]], Any]:
    """Return what sentence-transformers computes for texts."""
    import sentence_transformers

    model = getattr(sentence_transformers, kind)(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    return lambda texts: model.encode(texts, batch_size=32, show_progress_bar=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = (ROOT / "benchmarks" / "corpora" / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: options.texts]]
    with tempfile.TemporaryDirectory() as place:
        for kind, make in (("SparseEncoder", splade), ("MultiVectorEncoder", colbert)):
            folder = make(Path(place) / kind)
            contenders = {
                "inferctl bf16": ours(folder, "bf16"),
                "inferctl fp32": ours(folder, "fp32"),
                "sentence-transformers bf16": theirs(kind, folder, torch.bfloat16),
                "sentence-transformers fp32": theirs(kind, folder, torch.float32),
            }
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for run in contenders.values():
                run(texts[:16])
            for _ in range(options.rounds):
                for name, run in contenders.items():
                    started = time.process_time()
                    run(texts)
                    seconds[name].append(time.process_time() - started)
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            for precision in ("fp32", "bf16"):
                mine, other = medians[f"inferctl {precision}"], medians[f"sentence-transformers {precision}"]
                rates = f"{len(texts) / mine:.1f} against {len(texts) / other:.1f} texts per CPU second"
                print(f"{kind} {precision}: {rates}, {other / mine:.2f}x", flush=True)


if __name__ == "__main__":
    main()
