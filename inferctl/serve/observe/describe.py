"""The description of the server: the document of `GET /info`, and the lines printed at the start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import inferctl
from inferctl.config.spec import MAX_CLIENT_BATCH, Spec
from inferctl.models import vector_format
from inferctl.models.model import ModelFolder
from inferctl.reading import model_summary
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.edge.edge import EdgeLimits
from inferctl.serve.engine_process.engine_protocol import EngineInfo
from inferctl.serve.text import tokenizer_pool

# Tokens of the texts whose FLOP per token `GET /info` has.
_LENGTHS = (16, 64, 256)


def document(
    spec: Spec,
    folder: ModelFolder,
    config: TaskConfig,
    tokenizer: dict[str, Any],
    info: EngineInfo,
    truncate: bool,
    image: tuple[str, str | None] | None,
) -> dict[str, Any]:
    """Return the part of `GET /info` that does not change while an engine process runs.

    `tokenizer`: `facts` of the tokenizer.
    """
    engine = info.to_json()
    fidelity: dict[str, Any] = {"within_limit": info.within_limit, "check": info.check}
    if isinstance(config, EmbeddingConfig):
        # Sparse weights are always floats.
        formats = vector_format.FORMATS if config.outputs != ("sparse",) else ()
        output: dict[str, Any] = {
            "dimensions": info.dimensions,
            "token_dimensions": info.token_dimensions,
            "vocabulary_size": info.vocabulary_size,
            "output_dtypes": formats,
        }
        fidelity |= {"cosine_min": info.cosine_min, "cosine_mean": info.cosine_mean, "limit": info.cosine_limit}
    else:
        output = {}
        fidelity |= {"logit_error": info.logit_error, "limit": info.logit_error_limit}
    return {
        "name": spec.name,
        "task": config.task,
        "inferctl": inferctl.__version__,
        "model": {
            "source": spec.model.source,
            "sha256": folder.digest,
            "architecture": folder.architecture,
            **model_summary.of_config(config),
            "direction": None if info.causal is None else "causal" if info.causal else "bidirectional",
            **tokenizer,
            **output,
        },
        "precision": engine["precision"],
        "attention": info.attention,
        "attention_reason": info.attention_reason,
        "graphs": info.graphs or None,
        "fidelity": fidelity,
        "warnings": info.warnings,
        "device": engine["device"],
        "compute": {
            "matrix_rate": engine["matrix_rate"],
            "flops_per_token": {str(n): round(info.flops.flop(n) / n) for n in _LENGTHS} if info.flops else None,
        },
        "parallel_batches": info.parallel,
        "idle_batches": info.idle_parallel,
        "versions": {"python": sys.version.split()[0], **info.versions},
        "limits": {
            "max_client_batch": MAX_CLIENT_BATCH,
            "max_input_tokens": tokenizer["max_tokens"],
            "max_batch_tokens": info.batch_tokens,
            "max_queue_tokens": spec.serve.max_queue_tokens,
            "max_wait_seconds": spec.serve.max_wait_seconds,
            "max_body_bytes": EdgeLimits().max_body_bytes,
            "truncate": truncate,
        },
        "image": {"reference": image[0], "digest": image[1]} if image else None,
        **_of_tei(spec, folder, config, tokenizer["max_tokens"], info, truncate),
    }


def _of_tei(
    spec: Spec, folder: ModelFolder, config: TaskConfig, max_tokens: int, info: EngineInfo, truncate: bool
) -> dict[str, Any]:
    """Return the fields of text-embeddings-inference, whose clients choose what to send by `model_type`.

    Source: `Info` in its `router/src/lib.rs`.
    """
    precision = info.precision.effective
    return {
        "model_id": spec.model.source,
        "model_sha": spec.model.revision,
        "model_dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(precision, precision),
        "model_type": config.tei_type,
        "max_concurrent_requests": EdgeLimits().max_requests,
        "max_input_length": max_tokens,
        "max_batch_tokens": info.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": MAX_CLIENT_BATCH,
        "auto_truncate": truncate,
        "tokenization_workers": tokenizer_pool.THREADS,
        "version": inferctl.__version__,
    }


def lines(info: EngineInfo, slo_ms: float | None = None, config: TaskConfig | None = None) -> Iterator[str]:
    """Yield the lines about a model printed when the server is ready. `config`: that of the model."""
    precision, device = info.precision, info.device
    requested = f" (requested: {precision.requested})" if precision.requested != precision.effective else ""
    yield f"precision  {precision.effective}{requested}, {precision.level}, {precision.method}: {precision.reason}"
    yield f"attention  {info.attention}: {info.attention_reason}"
    if info.graphs:
        yield f"graphs     {info.graphs}"
    if info.cosine_min is not None:
        cosines = f"minimum {info.cosine_min:.5f}, mean {info.cosine_mean:.5f}"
        yield f"fidelity   cosine to fp32: {cosines} ({info.check})"
    if info.logit_error is not None:
        yield f"fidelity   largest relative error of logits: {info.logit_error:.5f} ({info.check})"
    cores = f", {device.threads} threads, {info.parallel} batches at a time"
    yield f"device     {device.name}" + (
        cores if device.threads else f", compute capability {device.compute_capability}"
    )
    if isinstance(config, EmbeddingConfig):
        if config.trained != ("dense",):
            yield f"outputs    {', '.join(config.trained)}"
        if config.prompts.summary:
            yield f"prompts    {config.prompts.summary}"
    if slo_ms:
        yield f"admission  rejects requests (429) whose predicted latency exceeds {slo_ms:g} ms (slo.p99_ms)"
    for warning in info.warnings:
        yield f"warning    {warning}"
