"""The reference implementations of what a model folder computes: fp32, one input at a time.

    echo '["a text", {"input": "a text", "prompt_name": "query"}]' | python -m inferctl.serve.reference MODEL_DIR
    echo '[["a query", "a document"]]' | python -m inferctl.serve.reference CROSS_ENCODER_DIR
    echo '["a text", [{"role": "user", "content": "hi"}]]' | python -m inferctl.serve.reference LLM_DIR

stdout is JSON: `model_sha256`, `tokens` (per input), and one of these, by the task (`--task`, else that of the folder):

- embed: `dimensions` and `embeddings` (base64 of little-endian float32).
- rerank, for pairs: `scores` (after the activation).
- generate, for texts or lists of chat messages: `texts`, one object per input. `ids` are its tokens. The lists
  `logprobs` (of the next token), `top_ids` and `top_logprobs` (of the 64 most likely tokens) have one entry per token
  but the last. It is null for chat messages without a chat template.

`--max-input-tokens N` truncates like a server with that limit. For generate, an input has at most 256 tokens, and with
`--max-tokens N` the output ends with the input that reaches N tokens in all.

Image verification and benchmarks compare with it: it uses no batcher, packed attention or quantization. For embed and
rerank, it shares the tokenization and the configuration with the server, so the comparison does not detect errors in
these. With `--library`, sentence-transformers computes everything, from the text on, and `library` is its version.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer

from inferctl.config.spec import Task, TaskSetting
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models import model
from inferctl.serve import task_config
from inferctl.serve.engines import hide_scikit_learn
from inferctl.serve.main import exit_with
from inferctl.serve.modules import read_object
from inferctl.serve.rerank_config import RerankConfig
from inferctl.serve.tokenizer_pool import TokenizerPool

# What selects the prompt of an input for embeddings, as in a request.
_PROMPT_KEYS = ("prompt", "prompt_name", "input_type")


def reference(
    source: str,
    inputs: list[Any],
    max_input_tokens: int | None = None,
    task: TaskSetting = "auto",
    max_tokens: int | None = None,
    with_library: bool = False,
) -> dict[str, Any]:
    """Return what `python -m inferctl.serve.reference` prints. `auto` is the task that the folder implies.

    Raises `UsageError` if the folder is not a model, or the inputs are not for its task, and `NotReadyError` if
    sentence-transformers cannot load it.
    """
    folder = model.find(source)
    found = model.resolve_task(task, folder, source)
    fits = {"embed": _is_input, "rerank": _is_pair, "generate": _is_prompt}[found]
    if not all(map(fits, inputs)):
        wanted = "pass texts to embed, pairs of texts to rerank, or texts and chat messages to continue"
        raise UsageError(f"{source} is a model for {found}", wanted)
    if found == "generate":
        return {"model_sha256": folder.digest} | _next_tokens(folder.path, inputs, max_input_tokens, max_tokens)
    if with_library:
        compute = library(folder.path, found, max_input_tokens)
        rows = np.stack([compute(each, show_progress_bar=False) for each in inputs])
        output = {"scores": rows.tolist()} if found == "rerank" else {"embeddings": _base64(rows)}
        return {"model_sha256": folder.digest, "library": version("sentence-transformers"), **output}
    config = task_config.read(found, folder.path, max_input_tokens)
    pool = TokenizerPool(folder.path, config, threads=1)

    from inferctl.serve.engines import plain

    loaded = plain.Reference(folder.path, config)
    document: dict[str, Any] = {"model_sha256": folder.digest}
    if isinstance(config, RerankConfig):
        pairs = pool.encode_pairs_now([pair[0] for pair in inputs], [pair[1] for pair in inputs], truncate=True)
        document["tokens"] = [len(ids) for ids, _ in pairs]
        document["scores"] = config.scores(loaded.score(pairs))[:, 0].tolist()
    else:
        texts = [{"input": each} if _is_text(each) else each for each in inputs]
        selected = [config.prompts.select(*(each.get(key) for key in _PROMPT_KEYS)) for each in texts]
        sequences = [
            pool.encode_now([each["input"]], truncate=True, prompt=prompt)[0]
            for each, prompt in zip(texts, selected, strict=True)
        ]
        vectors = loaded.embed(sequences)
        document |= {"dimensions": int(vectors.shape[1]), "tokens": [len(ids) for ids in sequences]}
        document["embeddings"] = _base64(vectors)
    pool.close()
    return document


def library(
    folder: Path, task: Task, max_input_tokens: int | None = None, device: str = "cpu", dtype: str = "float32"
) -> Callable[..., Any]:
    """Return the function with which sentence-transformers turns texts into vectors, or pairs into scores.

    It loads the modules of the folder, from this machine alone, and truncates like a server with `max_input_tokens`.
    Raises `UsageError` for a folder that the server does not accept, which is where code of a model ends, and
    `NotReadyError` if the library cannot load it.
    """
    import sentence_transformers
    import torch

    pool = TokenizerPool(folder, task_config.read(task, folder), threads=1)
    pool.close()
    options: dict[str, Any] = {"device": device, "trust_remote_code": False, "local_files_only": True}
    if pool.transformers_options:
        options["processor_kwargs"] = pool.transformers_options
    kind = getattr(sentence_transformers, "CrossEncoder" if task == "rerank" else "SentenceTransformer")
    model_options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if read_object(folder / "config.json").get("attn_logit_softcapping"):
        model_options["attn_implementation"] = "eager"  # SDPA, the default, leaves the soft cap out
    try:
        loaded = kind(str(folder), model_kwargs=model_options, **options)
    except Exception as error:  # the modules of a folder can fail in any way
        raise NotReadyError(f"sentence-transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    if dtype == "float32":
        loaded.float()  # static embeddings keep the format of their file
    if max_input_tokens is not None:
        if (static := getattr(loaded[0], "tokenizer", None)) and isinstance(static, Tokenizer):
            own = (static.truncation or {}).get("max_length", max_input_tokens)
            static.enable_truncation(min(own, max_input_tokens))
        else:
            loaded.max_seq_length = min(loaded.max_seq_length or max_input_tokens, max_input_tokens)
    run: Callable[..., Any] = loaded.predict if task == "rerank" else loaded.encode
    return run


def _next_tokens(
    folder: Path, inputs: list[Any], max_input_tokens: int | None, max_tokens: int | None
) -> dict[str, Any]:
    from inferctl.serve.engines.causal import CausalModel

    loaded = CausalModel(folder)
    texts: list[dict[str, Any] | None] = []
    tokens: list[int] = []
    for text in inputs:
        if max_tokens is not None and sum(tokens) >= max_tokens:
            break
        ids = loaded.encode(text)
        texts.append(loaded.score(ids[:max_input_tokens]) if ids else None)
        tokens.append(len(ids or ()))
    return {"tokens": tokens, "texts": texts}


def _base64(vectors: Any) -> list[str]:
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"invalid arguments: {message}",
            "run `python -m inferctl.serve.reference MODEL_DIR [--task TASK] [--max-input-tokens N] [--max-tokens N] "
            "[--library] < inputs.json`",
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_input(value: Any) -> bool:
    return _is_text(value) or (
        isinstance(value, dict)
        and _is_text(value.get("input"))
        and all(isinstance(value.get(key), str | None) for key in _PROMPT_KEYS)
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_prompt(value: Any) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)
    )


def main() -> int:
    """Read the inputs from stdin, write the output of the model to stdout, and return the exit code."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # spare a server on the same cores; torch reads it when it loads
    parser = _Parser(add_help=False)
    parser.add_argument("source")
    parser.add_argument("--task", choices=("auto", "embed", "rerank", "generate"), default="auto")
    parser.add_argument("--max-input-tokens", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--library", action="store_true")
    options = parser.parse_args()
    if options.library:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    else:
        hide_scikit_learn()
    hint = 'pass a JSON list of texts, such as `["first text", "second text"]`, of pairs of texts, or of chat messages'
    try:
        inputs = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}", hint) from None
    kinds = (_is_input, _is_pair, _is_prompt)
    if not isinstance(inputs, list) or not inputs or not any(all(map(kind, inputs)) for kind in kinds):
        raise UsageError("stdin is not a list of texts, of pairs of texts or of chat messages", hint)
    limits = options.max_input_tokens, options.task, options.max_tokens
    found = reference(options.source, inputs, *limits, with_library=options.library)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
