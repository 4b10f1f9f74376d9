"""The reference embeddings of a model folder, by the plainest path there is: transformers, fp32, one text at a time.

    echo '["a text"]' | python -m inferctl.serve.reference MODEL_DIR

stdout is JSON: `model_sha256`, `dimensions`, `tokens` (per text) and `embeddings` (base64 of little-endian float32). `--max-input-tokens N` cuts
texts where a server with that limit does. Batcher, packed attention and quantisation take no part, so image verification and benchmarks can
compare with it; tokenising and the reading of the model's recipe are the server's own, and a mistake in those shows in neither.
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
from inferctl.serve import recipe
from inferctl.serve.main import exit_with
from inferctl.serve.tokenise import TokenizerPool


def reference(source: str, texts: list[str], max_input_tokens: int | None = None) -> dict[str, Any]:
    """What `python -m inferctl.serve.reference` prints. Raises `UsageError` for a folder that is not a model."""
    folder = model.find(source)
    how = recipe.read(folder.path, max_input_tokens)
    pool = TokenizerPool(folder.path, how, threads=1)
    sequences = [pool.encode_now([text], truncate=True)[0] for text in texts]
    pool.close()

    from inferctl.serve.engines import plain

    vectors = plain.embed(plain.load_model(folder.path), sequences, how)
    return {
        "model_sha256": folder.digest,
        "dimensions": int(vectors.shape[1]),
        "tokens": [len(ids) for ids in sequences],
        "embeddings": [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors],
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"expected one argument, the model folder: {message}",
            "python -m inferctl.serve.reference MODEL_DIR [--max-input-tokens N] < texts.json",
        )


def main() -> int:
    """Read texts from stdin and write their embeddings to stdout; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a server may run beside; read when torch is loaded
    parser = _Parser(add_help=False)
    parser.add_argument("source")
    parser.add_argument("--max-input-tokens", type=int)
    given = parser.parse_args()
    try:
        texts = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}", "stdin is a JSON list of texts") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError("stdin is not a list of texts", 'as in `["one text", "another"]`')
    sys.stdout.write(json.dumps(reference(given.source, texts, given.max_input_tokens)) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
