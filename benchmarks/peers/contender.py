"""Embed texts in-process with one library, in a process of its own and in the virtual environment of the library.

    python contender.py NAME MODEL TEXTS.json

It prints the vectors as one line of JSON. Then, for each line on stdin, it embeds all texts and prints the wall-clock
and the CPU seconds, tokenization included.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Embed = Callable[[list[str]], Any]


def inferctl(precision: str, model: str) -> Embed:
    from inferctl.serve import embedding_config
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine
    from inferctl.serve.tokenizer_pool import TokenizerPool

    engine = EncoderEngine(EngineConfig(model=model, precision=precision, device="cpu"))
    info = engine.load()
    limit, pool = info.batch_tokens, ThreadPoolExecutor(info.parallel)
    tokenizer = TokenizerPool(Path(model), embedding_config.read(Path(model), None))

    def embed(texts: list[str]) -> Any:
        sequences = tokenizer.encode_now(texts, truncate=True)
        running, part = [], []
        for index, ids in enumerate(sequences):
            part.append(ids)
            following = len(sequences[index + 1]) if index + 1 < len(sequences) else limit
            if sum(map(len, part)) + following > limit:
                lengths = np.array([len(s) for s in part], dtype=np.int32)
                running.append(pool.submit(engine.run, Batch(0, np.concatenate(part), lengths)))
                part = []
        return np.concatenate([batch.result().vectors for batch in running])

    return embed


def sentence_transformers(precision: str, model: str) -> Embed:
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    encoder = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": dtype})
    return lambda texts: encoder.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def openvino(precision: str, model: str) -> Embed:
    """Return an embedder in OpenVINO: sorted by length, batches of 32, mean pooling.

    int8 is post-training quantization by nncf, calibrated on other texts.
    """
    import openvino as ov
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModel.from_pretrained(model, attn_implementation="sdpa").eval()
    example = dict(tokenizer(["one", "two texts"], padding=True, return_tensors="pt"))
    converted = ov.convert_model(plain, example_input=example)
    if precision == "int8":
        import nncf

        calibration = json.loads(Path(sys.argv[3]).read_text())["calibration"]
        encoded = [
            {k: v.numpy() for k, v in tokenizer([t], return_tensors="pt", truncation=True, max_length=256).items()}
            for t in calibration
        ]
        converted = nncf.quantize(
            converted, nncf.Dataset(encoded), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(encoded)
        )
    hint = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}[precision]
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"})
    del torch

    def embed(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out = np.empty((len(texts), plain.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            inputs = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="np"
            )
            hidden = compiled(dict(inputs))[0]
            mask = inputs["attention_mask"][..., None].astype(np.float32)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return out

    return embed


def main() -> None:
    name, model, file = sys.argv[1:]
    texts = json.loads(Path(file).read_text())["texts"]
    library, _, precision = name.rpartition(" ")
    maker = {"inferctl": inferctl, "sentence-transformers": sentence_transformers, "openvino": openvino}[library]
    output = sys.stdout
    sys.stdout = sys.stderr  # libraries print to stdout
    embed = maker(precision, model)
    print(json.dumps(np.asarray(embed(texts), dtype=np.float32).round(6).tolist()), file=output, flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        embed(texts)
        print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]), file=output, flush=True)


if __name__ == "__main__":
    main()
