"""Embed texts in-process with one library, in a process and a virtual environment of its own.

    python contender.py NAME MODEL TEXTS.json

TEXTS.json has `texts`. It prints an empty line when the model is loaded, and the vectors as one line of JSON, of all or
of the texts `compared`. Then, for each line on stdin, it computes them again and prints the wall-clock and the CPU
seconds, tokenization included. CONTENDER_DEVICE is `cpu` [default] or `cuda`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DEVICE = os.environ.get("CONTENDER_DEVICE", "cpu")
Embed = Callable[[list[str]], Any]


def inferctl(precision: str, model: str) -> Embed:
    from inferctl.reading import embedding_config
    from inferctl.serve.text.tokenizer_pool import TokenizerPool

    run = run_batches(precision, model)
    tokenizer = TokenizerPool(Path(model), embedding_config.read(Path(model), None))
    return lambda texts: run(tokenizer.encode_now(texts, truncate=True))


def inferctl_embed(precision: str, model: str) -> Embed:
    """Return what `inferctl embed` computes with, for ranges of as many texts as it has."""
    import asyncio

    from inferctl.config.spec import Spec
    from inferctl.embed import computer
    from inferctl.embed.local import LocalComputer, LocalOptions
    from inferctl.models.model import ModelFolder

    spec = Spec.model_validate({"name": "m", "model": {"source": model}, "serve": {"precision": precision}})
    local = LocalComputer(spec, "embed", ModelFolder(Path(model)), LocalOptions(truncate=True, device=DEVICE))
    loop, progress = asyncio.new_event_loop(), computer.Progress()
    loop.run_until_complete(local.start())

    async def compute(texts: list[str]) -> Any:
        ranges = [texts[start : start + 65_536] for start in range(0, len(texts), 65_536)]
        found = await asyncio.gather(*(computer.compute(local, each, progress) for each in ranges))
        return np.concatenate([each.rows for each in found])

    return lambda texts: loop.run_until_complete(compute(texts))


def run_batches(precision: str, model: str) -> Callable[[Sequence[Any]], Any]:
    """Return a function that runs sequences in batches as large as the engine accepts, as many at a time as it runs."""
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine

    # Random weights can miss the accuracy that trained ones reach. The scripts print the differences.
    config = EngineConfig(model=model, task="embed", precision=precision, device=DEVICE, allow_inaccurate=True)
    engine = EncoderEngine(config)
    info = engine.load()
    pool = ThreadPoolExecutor(info.parallel)

    def run(sequences: Sequence[Any]) -> Any:
        lengths = np.array([len(s) for s in sequences], dtype=np.int32)
        running, first, used = [], 0, 0
        for index, length in enumerate([*lengths.tolist(), info.batch_tokens + 1]):
            if index and used + length > info.batch_tokens:
                part = slice(first, index)
                running.append(pool.submit(engine.run, Batch(0, np.concatenate(sequences[part]), lengths[part])))
                first, used = index, 0
            used += length
        return np.concatenate([batch.result().rows for batch in running])

    return run


def sentence_transformers(precision: str, model: str) -> Embed:
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    encoder = SentenceTransformer(model, device=DEVICE, model_kwargs={"dtype": dtype})
    return lambda texts: encoder.encode(
        texts, batch_size=32 if DEVICE == "cpu" else 128, normalize_embeddings=True, show_progress_bar=False
    )


def backend(kind: Any, precision: str, model: str) -> Embed:
    """Return an embedder with a backend of sentence-transformers, as its documentation has it."""
    from sentence_transformers import SentenceTransformer

    options = {"file_name": next(Path(model).glob("*.onnx")).name} if kind == "onnx" else {"export": True}
    encoder = SentenceTransformer(model, device="cpu", backend=kind, model_kwargs=options)
    return lambda texts: encoder.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def fastembed(precision: str, model: str) -> Embed:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    source, name = ModelSource(hf="local/model"), next(Path(model).glob("*.onnx")).name
    size = json.loads((Path(model) / "config.json").read_text())["hidden_size"]
    TextEmbedding.add_custom_model("local/model", PoolingType.MEAN, True, source, size, name)
    encoder = TextEmbedding("local/model", specific_model_path=model)
    encoder.model.tokenizer.enable_truncation(256)  # as the others: the tokenizer of this model has 128
    return lambda texts: list(encoder.embed(texts, batch_size=32))


def infinity(engine: str, precision: str, model: str) -> Embed:
    from infinity_emb import EngineArgs, SyncEngineArray

    os.chdir(model)  # as for the server, see peers.infinity
    options = {"dtype": {"bf16": "bfloat16", "int8": "auto"}[precision], "pooling_method": "mean"}
    arguments = EngineArgs(model_name_or_path=".", engine=engine, device="cpu", bettertransformer=False, **options)
    engines = SyncEngineArray.from_args([arguments])
    return lambda texts: engines.embed(model=arguments.served_model_name, sentences=texts).result()[0]


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
    inputs = json.loads(Path(file).read_text())
    library, _, precision = name.rpartition(" ")
    output = sys.stdout
    sys.stdout = sys.stderr  # libraries print to stdout
    makers = {
        "inferctl": inferctl,
        "inferctl embed": inferctl_embed,
        "infinity torch": partial(infinity, "torch"),
        "infinity onnx": partial(infinity, "optimum"),
        "fastembed": fastembed,
        "sentence-transformers": sentence_transformers,
        "sentence-transformers onnx": partial(backend, "onnx"),
        "sentence-transformers openvino": partial(backend, "openvino"),
        "openvino": openvino,
    }
    embed = makers[library](precision, model)
    print(file=output, flush=True)
    print(
        json.dumps(np.asarray(embed(inputs.get("compared", inputs["texts"])), dtype=np.float32).round(6).tolist()),
        file=output,
        flush=True,
    )
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        embed(inputs["texts"])
        print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]), file=output, flush=True)


if __name__ == "__main__":
    main()
