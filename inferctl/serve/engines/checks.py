"""The checks at the start: is packed attention correct for this model, and how close are its vectors to fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models.model import ModelFolder
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, Outputs, Role, form_of, mark, pack, unpack
from inferctl.reading.rows import Rows, Vectors, finite_rows, join_rows
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.engine_process import failures
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
from inferctl.serve.engines import plain, tokenizer_check
from inferctl.serve.engines.forward import AnyForward, Forward
from inferctl.serve.engines.prepared import Sequences
from inferctl.serve.text.tokenizer_pool import TokenizerPool

# Of larger models, one text or two sequences are compared, which fp32 computes one layer at a time.
_MAX_CHECKED_PARAMETERS = 1_500_000_000
# Which ones, of those that are made of the texts: two pairs, or one text as a document and as a query.
_SAMPLE = (1, 9)
# The largest error to fp32, and of packed to padded in the same format. `isolated`: of packed texts to the same texts
# in batches of one. LLM.int8 depends on them a little. The error of a text that attends to its neighbors is far above.
_MAX_COSINE_DISTANCE = {"fp32": 0.00001, "bf16": 0.01, "fp16": 0.001, "int8": 0.05, "isolated": 0.005}
_MAX_LOGIT_ERROR = {"fp32": 0.001, "bf16": 0.05, "fp16": 0.01, "int8": 0.25, "isolated": 0.02}

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
    """The check texts and their fp32 results. Create it before the model is loaded: memory may not suffice for both.

    For a head that takes pairs, the texts are paired. `description` says what is compared. `causal`, `flops`: as in
    `EngineInfo`. `hint` is that of errors about insufficient memory.
    """

    def __init__(self, folder: ModelFolder, config: TaskConfig, hint: str) -> None:
        self._logits, self._hint = config.task != "embed", hint
        large = folder.parameters > _MAX_CHECKED_PARAMETERS
        pool = tokenizer_check.checked(folder.path, config)
        self._vocabulary_size = pool.vocabulary_size
        if isinstance(config, EmbeddingConfig):
            self.texts = _embedded(pool, config)
        else:
            # Some texts are paired with themselves, so that not all scores are low. A template needs a short query.
            queries = _TEXTS + _TEXTS[:4] if pool.private is None else _TEXTS[:1] * 12
            inputs = pool.encode_pairs_now(queries, _TEXTS[::-1] + _TEXTS[:4], truncate=True)
            if config.takes_texts:
                inputs += [(ids, len(ids)) for ids in pool.encode_now(_TEXTS, truncate=True)]
            self.texts = Sequences.of_pairs(inputs)
        pool.close()
        self._compared = [index for index in _SAMPLE if index < len(self.texts)] if large else range(len(self.texts))
        loaded = plain.Reference(folder.path, config, by_layer=large)
        self.check_vocabulary(loaded.vocabulary_size)
        self.causal = loaded.causal
        sample = self.texts.take(self._compared)
        self._marks = sample.marks
        self._expected: Rows
        if self._logits:
            self._expected = loaded.score(list(zip(sample.ids, sample.marks or (), strict=True)))
        elif sample.marks is None:
            self._expected = loaded.embed(sample.ids)
        else:
            each = zip(sample.ids, sample.marks, strict=True)
            self._expected = [pack(form_of(number), loaded.outputs(ids, number)) for ids, number in each]
        self.flops = loaded.flops
        self.sizes = 0, 0  # those of `Forward.sizes`
        kinds = {"texts": config.takes_texts, "pairs": config.takes_pairs}
        what = " and ".join(kind for kind, taken in kinds.items() if taken)
        of_all = f" of {len(self.texts)}" * large
        self.description = f"{len(sample)}{of_all} {what} compared with padded fp32{', layer by layer' * large}"

    def check_vocabulary(self, size: int) -> None:
        """Raise `UsageError` if the tokenizer has ids for which the model has no embedding: texts with them fail."""
        if self._vocabulary_size > size:
            raise UsageError(
                f"tokenizer.json has token ids up to {self._vocabulary_size - 1}, but the model has embeddings "
                f"or weights for {size}, up to {size - 1}",
                "use the tokenizer.json that belongs to these weights",
            )

    def run(self, forward: AnyForward) -> Rows:
        """Return the vectors or logits of the check texts. Raises `NotReadyError` if memory is insufficient for one."""
        return self._run_in_parts(forward, self.texts)

    def choose_attention(self, forward: Forward, precision: PrecisionInfo) -> tuple[str, Rows, str | None]:
        """Let `forward` use packed attention if the result equals that of padded attention.

        Returns the reason, what `run` returns with the chosen attention, and why it is padded, else None.
        """
        padded = self.run(forward)
        try:
            forward.pack()
            batched, isolated = self.run(forward), self._run_alone(forward)
        except Exception as error:  # architectures reject packing with various errors; padding works for all
            if isinstance(error, NotReadyError) or failures.out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {failures.summary(error)}"
        else:
            limits = _MAX_LOGIT_ERROR if self._logits else _MAX_COSINE_DISTANCE
            marks = self.texts.marks
            errors = self._errors(batched, padded, marks), self._errors(batched, isolated, marks)
            limit = limits["isolated"]
            if errors[0].max() <= limits[precision.effective] and errors[1].max() > limit:
                # Deep models in bf16 round differently for each size of a batch, without any attention to neighbors.
                forward.pack(False)
                limit = max(limit, 2 * float(self._errors(padded, self._run_alone(forward), marks).max()))
                forward.pack()
            if errors[0].max() <= limits[precision.effective] and errors[1].max() <= limit:
                return "no padding; equals the padded result", batched, None
            worst = float(np.concatenate(errors).max())
            measure = f"relative logit error {worst:.4f}" if self._logits else f"cosine {1 - worst:.4f}"
            reason = f"packed differs from padded ({measure})"
        forward.pack(False)
        return f"sorted by length; {reason}", self.run(forward), reason  # what serves is what is compared with fp32

    def compare(self, results: Rows, precision: PrecisionInfo, allowed: bool) -> tuple[dict[str, Any], str | None]:
        """Return the fields of `EngineInfo` about fidelity to fp32, and a warning if it is below the limit.

        `results`: what `run` returned. `allowed`: whether a reduced precision may be below its limit. Raises
        `UsageError` if it may not, and for NaN or infinity.
        """
        effective = precision.effective
        if bad := int((~finite_rows(results)).sum()):
            message = f"the model returns NaN or infinity for {bad} of {len(results)} check texts in {effective}"
            hints = {"fp32": "check the weights of the model", "bf16": "use `--precision fp32`"}
            raise UsageError(message, hints.get(effective, "use `--precision bf16` or `--precision fp32`"))
        if len({ids.tobytes() for ids in self.texts.ids}) > 1 and len({row.tobytes() for row in results}) == 1:
            raise UsageError("the model returns the same result for all check texts", "check the weights of the model")
        fields: dict[str, Any] = {"check": self.description}
        errors = self._errors([results[index] for index in self._compared], self._expected, self._marks)
        worst = float(errors.max())
        if self._logits:
            limit = _MAX_LOGIT_ERROR[effective]
            fields |= {"logit_error": worst, "logit_error_limit": limit}
            problem = f"relative error of logits {worst:.5f}, expected at most {limit}"
        else:
            limit = _MAX_COSINE_DISTANCE[effective]
            fields |= {"cosine_min": 1 - worst, "cosine_mean": 1 - float(errors.mean()), "cosine_limit": 1 - limit}
            problem = f"cosine to fp32 {1 - worst:.5f}, expected at least {1 - limit}"
        if worst <= limit:
            return fields, None
        problem = f"{effective} is inaccurate: {problem}"
        if effective == "fp32" and not precision.tf32:
            raise UsageError(problem, "use another model: the server does not compute this one correctly")
        fix = (
            "`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0` turns TF32 off"
            if precision.tf32
            else "`--precision fp32` avoids this"
        )
        if not allowed:
            raise UsageError(problem, f"{fix}; `--allow-inaccurate` accepts it")
        return fields, f"{problem}. {fix}"

    def _run_alone(self, forward: Forward) -> Rows:
        """Return what `run` returns, computed in batches of one."""
        return join_rows([forward(self.texts.take([index]))[0] for index in range(len(self.texts))])

    def _run_in_parts(self, forward: AnyForward, sequences: Sequences) -> Rows:
        """Return what `forward` returns, computed in halves if memory is insufficient for the whole."""
        try:
            return forward(sequences)
        except Exception as error:
            if not failures.out_of_memory(error):
                raise
            if len(sequences) == 1:
                message = f"insufficient memory for one input of {len(sequences.ids[0])} tokens: "
                hint = f"{self._hint}; or lower `serve.max_input_tokens`"
                raise NotReadyError(message + failures.summary(error), hint) from error
        torch.cuda.empty_cache()
        half = len(sequences) // 2
        parts = range(half), range(half, len(sequences))
        return join_rows([row for part in parts for row in self._run_in_parts(forward, sequences.take(part))])

    def _errors(self, results: Rows, expected: Rows, marks: Sequence[int] | None) -> Vectors:
        """Return for each row its distance to the expected one, or the error of logits, relative to the largest.

        The distance of vectors of equal length is 1 - cosine. A wrong length adds to it. Of several outputs, which
        `marks` name, the largest distance counts.
        """
        if self._logits:
            relative: Vectors = np.abs(np.subtract(results, expected)).max(axis=1) / max(1e-12, np.abs(expected).max())
            return relative
        if marks is None:
            return np.array([_distance(*pair) for pair in zip(results, expected, strict=True)], dtype=np.float32)
        forms = [form_of(number) for number in marks]
        rows = [
            [unpack(row, form, *self.sizes) for row, form in zip(each, forms, strict=True)]
            for each in (results, expected)
        ]
        return np.array([_largest_distance(*pair) for pair in zip(*rows, strict=True)], dtype=np.float32)


def _embedded(pool: TokenizerPool, config: EmbeddingConfig) -> Sequences:
    """Return the check texts as sequences: with all outputs, if the model was trained for others than a dense vector.

    Then each text is one of a document and one of a query.
    """
    form = config.checked
    if form == Form.DENSE:
        return Sequences(pool.encode_now(_TEXTS, truncate=True))
    ids, marks = [], []
    roles: dict[Role, Form] = {"document": form, "query": form | Form.QUERY}
    for role, each in roles.items():
        for found in pool.encode_now(_TEXTS, truncate=True, **config.text_options(role)):
            sequence, attended = config.tokens.expand(found) if role == "query" and config.tokens else (found, 0)
            ids.append(sequence)
            marks.append(mark(each, attended))
    return Sequences(ids, marks)


def _distance(first: Vectors, second: Vectors) -> float:
    if first.shape != second.shape:
        return float("inf")
    norms = max(1e-12, 2 * float(np.linalg.norm(first)) * float(np.linalg.norm(second)))
    return float(((first - second) ** 2).sum()) / norms if first.size else 0.0


def _largest_distance(first: Outputs, second: Outputs) -> float:
    ids = np.union1d(first.ids, second.ids)
    weights = np.zeros((2, len(ids)), np.float32)
    for row, outputs in zip(weights, (first, second), strict=True):
        row[np.searchsorted(ids, outputs.ids)] = outputs.weights
    return max(_distance(first.dense, second.dense), _distance(*weights), _distance(first.tokens, second.tokens))
