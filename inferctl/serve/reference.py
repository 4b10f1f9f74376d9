"""The reference implementation of the embeddings of a model folder: transformers, fp32, one text at a time.

    echo '["a text"]' | python -m inferctl.serve.reference MODEL_DIR

stdout is JSON: `model_sha256`, `dimensions`, `tokens` (per text) and `embeddings` (base64 of little-endian float32).
`--max-input-tokens N` truncates texts like a server with that limit. Image verification and benchmarks compare with it:
it uses no batcher, packed attention or quantization. It shares the tokenization and the embedding configuration with
the server, so the comparison does not detect errors in these.
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
from inferctl.serve import embedding_config
from inferctl.serve.main import exit_with
from inferctl.serve.tokenizer_pool import TokenizerPool


def reference(source: str, texts: list[str], max_input_tokens: int | None = None) -> dict[str, Any]:
    """Return what `python -m inferctl.serve.reference` prints. Raises `UsageError` if the folder is not a model."""
    folder = model.find(source)
    config = embedding_config.read(folder.path, max_input_tokens)
    pool = TokenizerPool(folder.path, config, threads=1)
    sequences = [pool.encode_now([text], truncate=True)[0] for text in texts]
    pool.close()

    from inferctl.serve.engines import plain

    vectors = plain.embed(plain.load_model(folder.path), sequences, config)
    return {
        "model_sha256": folder.digest,
        "dimensions": int(vectors.shape[1]),
        "tokens": [len(ids) for ids in sequences],
        "embeddings": [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors],
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"invalid arguments: {message}",
            "run `python -m inferctl.serve.reference MODEL_DIR [--max-input-tokens N] < texts.json`",
        )


def main() -> int:
    """Read texts from stdin, write their embeddings to stdout, and return the exit code."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # spare a server on the same cores; torch reads it when it loads
    parser = _Parser(add_help=False)
    parser.add_argument("source")
    parser.add_argument("--max-input-tokens", type=int)
    options = parser.parse_args()
    try:
        texts = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(
            f"stdin is not JSON: {error}", 'pass a JSON list of texts, such as `["first text", "second text"]`'
        ) from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(
            "stdin is not a list of texts", 'pass a JSON list of texts, such as `["first text", "second text"]`'
        )
    sys.stdout.write(json.dumps(reference(options.source, texts, options.max_input_tokens)) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
