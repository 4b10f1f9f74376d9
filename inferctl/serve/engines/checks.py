"""The checks at the start: is packed attention correct for this model, and how close are its vectors to fp32."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from inferctl.errors import NotReadyError
from inferctl.model import ModelFolder
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process import memory
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo, Vectors, finite_rows
from inferctl.serve.engines import plain
from inferctl.serve.engines.forward import Forward
from inferctl.serve.tokenizer_pool import TokenizerPool

log = logging.getLogger("inferctl.engine")

# Larger models are not loaded a second time for the comparison with fp32.
_MAX_CHECKED_PARAMETERS = 1_500_000_000
# Lowest cosine between packed texts and the same texts in isolation. A text that attends to its neighbors is far below.
# LLM.int8 depends on them a little.
_MIN_COSINE_ISOLATED = 0.995
# Lowest cosine to fp32, and of packed to padded in the same format.
_MIN_COSINE = {"fp32": 0.99999, "bf16": 0.99, "fp16": 0.999, "int8": 0.95}

_TEXTS = (
    "ok",
    "Which river flows through Vienna?",
    "Padding-free inference puts all sequences of a batch end to end, and each of them attends to itself alone.",
    "El veloz murciélago hindú comía feliz cardillo y kiwi; la cigüeña tocaba el saxofón.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)",
    "机器学习模型把文本变成向量。",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Invoice 4711, due 30 days after receipt, total 1,234.56 EUR. " * 40,
)


class Checks:
    """The check texts and their fp32 vectors. Create it before the model is loaded: memory may not suffice for both.

    `expected` is None if the model is too large to be loaded in fp32. `description` says what is compared.
    """

    def __init__(self, folder: ModelFolder, embedding: EmbeddingConfig) -> None:
        pool = TokenizerPool(folder.path, embedding, threads=1)
        self.texts = pool.encode_now(_TEXTS, truncate=True)
        pool.close()
        self.expected: Vectors | None = None
        self.description = f"not compared with fp32: {folder.parameters / 1e9:.1f} billion parameters"
        if folder.parameters <= _MAX_CHECKED_PARAMETERS:
            self.expected = plain.embed(plain.load_model(folder.path), self.texts, embedding)
            self.description = f"{len(self.texts)} texts compared with padded fp32"

    def choose_attention(self, forward: Forward, precision: PrecisionInfo) -> str:
        """Let `forward` use packed attention if the vectors equal those of padded attention. Return the reason."""
        padded = forward(self.texts)
        try:
            forward.pack()
            batched = forward(self.texts)
            isolated = np.concatenate([forward([ids]) for ids in self.texts])
        except Exception as error:  # architectures reject packing with various errors; padding works for all
            if memory.is_insufficient(error):
                raise
            reason = f"{type(error).__name__}: {memory.summary(error)}"
        else:
            to_padded, to_isolated = _cosines(batched, padded).min(), _cosines(batched, isolated).min()
            if to_padded >= _MIN_COSINE[precision.effective] and to_isolated >= _MIN_COSINE_ISOLATED:
                return "no padding; equals the padded result"
            reason = f"packed differs from padded (cosine {min(to_padded, to_isolated):.4f})"
        log.warning("packed attention is not used: %s", reason)
        forward.pack(False)
        return f"sorted by length; {reason}"

    def compare(self, vectors: Vectors, precision: PrecisionInfo) -> tuple[dict[str, Any], str | None]:
        """Return the fields of `EngineInfo` about fidelity to fp32, and a warning if it is below the limit.

        Raises `NotReadyError` for NaN or infinity.
        """
        effective, limit = precision.effective, _MIN_COSINE[precision.effective]
        if bad := int((~finite_rows(vectors)).sum()):
            message = f"the model returns NaN or infinity for {bad} of {len(vectors)} check texts in {effective}"
            hints = {"fp32": "check the weights of the model", "bf16": "use `--precision fp32`"}
            raise NotReadyError(message, hints.get(effective, "use `--precision bf16` or `--precision fp32`"))
        fields: dict[str, Any] = {"dimensions": vectors.shape[1], "check": self.description}
        if self.expected is None:
            return fields, None
        cosines = _cosines(vectors, self.expected)
        lowest = float(cosines.min())
        fields |= {"cosine_min": lowest, "cosine_mean": float(cosines.mean()), "cosine_limit": limit}
        if lowest >= limit:
            return fields, None
        warning = f"{effective} is inaccurate: cosine to fp32 {lowest:.5f}, expected at least {limit}"
        if effective != "fp32":
            warning += ". `--precision fp32` avoids this"
        elif precision.tf32:
            warning += ". `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0` turns TF32 off"
        return fields, warning


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    """Return the cosine of each row of `a` with the same row of `b`."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Vectors = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return result
