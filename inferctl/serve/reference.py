"""The reference implementation of the embeddings or scores of a model folder: transformers, fp32, one input at a time.

    echo '["a text"]' | python -m inferctl.serve.reference MODEL_DIR
    echo '[["a query", "a document"]]' | python -m inferctl.serve.reference CROSS_ENCODER_DIR

stdout is JSON: `model_sha256`, `tokens` (per input), for texts `dimensions` and `embeddings` (base64 of little-endian
float32), for pairs `scores` (after the activation). `--max-input-tokens N` truncates like a server with that limit.
Image verification and benchmarks compare with it: it uses no batcher, packed attention or quantization. It shares the
tokenization and the configuration with the server, so the comparison does not detect errors in these.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from typing import Any, NoReturn

from inferctl import model
from inferctl.errors import UsageError
from inferctl.serve import task_config
from inferctl.serve.main import exit_with
from inferctl.serve.rerank_config import RerankConfig
from inferctl.serve.tokenizer_pool import TokenizerPool


def reference(source: str, inputs: list[Any], max_input_tokens: int | None = None) -> dict[str, Any]:
    """Return what `python -m inferctl.serve.reference` prints, for texts, or for pairs of texts with a cross-encoder.

    Raises `UsageError` if the folder is not a model, or the inputs are not for its task.
    """
    folder = model.find(source)
    task = model.resolve_task("auto", folder.config, source, has_modules=folder.has_modules)
    if (task == "rerank") is isinstance(inputs[0], str):
        raise UsageError(f"{source} is a model for {task}", "pass texts to embed, or pairs of texts to rerank")
    config = task_config.read(task, folder.path, max_input_tokens)
    pool = TokenizerPool(folder.path, config, threads=1)

    from inferctl.serve.engines import plain

    loaded = plain.load_model(folder.path, task=task)
    document: dict[str, Any] = {"model_sha256": folder.digest}
    if isinstance(config, RerankConfig):
        pairs = pool.encode_pairs_now([pair[0] for pair in inputs], [pair[1] for pair in inputs], truncate=True)
        document["tokens"] = [len(ids) for ids, _ in pairs]
        document["scores"] = config.scores(plain.score(loaded, pairs))[:, 0].tolist()
    else:
        sequences = [pool.encode_now([text], truncate=True)[0] for text in inputs]
        vectors = plain.embed(loaded, sequences, config)
        document |= {"dimensions": int(vectors.shape[1]), "tokens": [len(ids) for ids in sequences]}
        document["embeddings"] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    pool.close()
    return document


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"invalid arguments: {message}",
            "run `python -m inferctl.serve.reference MODEL_DIR [--max-input-tokens N] < inputs.json`",
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def main() -> int:
    """Read texts or pairs from stdin, write their embeddings or scores to stdout, and return the exit code."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # spare a server on the same cores; torch reads it when it loads
    parser = _Parser(add_help=False)
    parser.add_argument("source")
    parser.add_argument("--max-input-tokens", type=int)
    options = parser.parse_args()
    hint = 'pass a JSON list of texts, such as `["first text", "second text"]`, or of pairs of texts'
    try:
        inputs = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}", hint) from None
    if not isinstance(inputs, list) or not inputs or not (all(map(_is_text, inputs)) or all(map(_is_pair, inputs))):
        raise UsageError("stdin is not a list of texts or of pairs of texts", hint)
    sys.stdout.write(json.dumps(reference(options.source, inputs, options.max_input_tokens)) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
