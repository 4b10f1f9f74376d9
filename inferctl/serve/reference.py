"""The reference implementations of what a model folder computes: fp32, one input at a time.

    echo '["a text", {"input": "a text", "prompt_name": "query"}]' | python -m inferctl.serve.reference MODEL_DIR
    echo '[["a query", "a document"]]' | python -m inferctl.serve.reference CROSS_ENCODER_DIR
    echo '["a text", [{"role": "user", "content": "hi"}]]' | python -m inferctl.serve.reference LLM_DIR

stdout is JSON: `model_sha256`, `tokens` (per input), and one of these, by the task (`--task`, else that of the folder):

- embed: `dimensions` and `embeddings` (base64 of little-endian float32). Of a model with other outputs, those that it
  has: `embeddings`, `sparse` (lists of token ids and of weights), `token_vectors` (those of all tokens of an input, one
  after the other).
- rerank, for pairs: `scores` (after the activation).
- classify, for texts or pairs: `labels`, and `scores` with the scores of all labels for each input.
- generate, for texts or lists of chat messages: `texts`, one object per input. `ids` are its tokens. The lists
  `logprobs` (of the next token), `top_ids` and `top_logprobs` (of the 64 most likely tokens) have one entry per token
  but the last. It is null for chat messages without a chat template.

`--max-input-tokens N` truncates like a server with that limit. For generate, an input has at most 256 tokens, and with
`--max-tokens N` the output ends with the input that reaches N tokens in all. The option for adapters, which can be
repeated, adds the `texts` with that LoRA adapter to the list `adapters`.

Image verification and benchmarks compare with it: it uses no batcher, packed attention or quantization. For all tasks
but generate, it shares the tokenization and the configuration with the server, so the comparison does not detect errors
in these. With `--library`, another library computes everything, from the text on, and `library` is its version: the
pipeline of transformers for classify, else sentence-transformers.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from inferctl.config.spec import Task, TaskSetting
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models import adapter, model
from inferctl.models.adapter import Adapter
from inferctl.models.reference_process import LIBRARIES
from inferctl.reading import task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.modules import read_object
from inferctl.reading.outputs import Form, Role, mark
from inferctl.reading.rows import Tokens
from inferctl.serve.engines import hide_unused_libraries
from inferctl.serve.main import Parser, exit_with
from inferctl.serve.text.text_parts import Pair
from inferctl.serve.text.tokenizer_pool import TokenizerPool

# The classes of sentence-transformers by what a model was trained for. It has none for BGE-M3, except for its vector.
_CLASSES = {
    None: "CrossEncoder",
    Form.DENSE: "SentenceTransformer",
    Form.SPARSE: "SparseEncoder",
    Form.TOKENS: "MultiVectorEncoder",
    Form.DENSE | Form.SPARSE | Form.TOKENS: "SentenceTransformer",
}
# What selects the prompt of an input for embeddings, as in a request.
_PROMPT_KEYS = ("prompt", "prompt_name", "input_type")


def reference(
    source: str,
    inputs: list[Any],
    max_input_tokens: int | None = None,
    task: TaskSetting = "auto",
    max_tokens: int | None = None,
    with_library: bool = False,
    adapters: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return what `python -m inferctl.serve.reference` prints. `auto` is the task that the folder implies.

    Raises `UsageError` if the folder is not a model, or the inputs are not for its task, and `NotReadyError` if
    sentence-transformers cannot load it.
    """
    folder = model.find(source)
    found = model.resolve_task(task, folder, source)
    if not all(_fits(found, each) for each in inputs):
        wanted = (
            "pass texts to embed, pairs of texts to rerank, both to classify, or texts and chat messages to continue"
        )
        raise UsageError(f"{source} is a model for {found}", wanted)
    if found == "generate":
        read = [adapter.read(path.name, path, folder) for path in adapters]
        return {"model_sha256": folder.digest} | _next_tokens(folder.path, inputs, max_input_tokens, max_tokens, read)
    if with_library:
        compute = library(folder.path, found, max_input_tokens)
        rows = [compute(each, show_progress_bar=False) for each in inputs]
        output = {"embeddings": _base64(rows)} if found == "embed" else {"scores": np.stack(rows).tolist()}
        return {"model_sha256": folder.digest, "library": version(LIBRARIES[found]), **output}
    config = task_config.read(found, folder.path, max_input_tokens)
    pool = TokenizerPool(folder.path, config, threads=1)

    from inferctl.serve.engines import plain

    loaded = plain.Reference(folder.path, config)
    document: dict[str, Any] = {"model_sha256": folder.digest}
    if not isinstance(config, EmbeddingConfig):
        encoded = [_encoded(pool, each) for each in inputs]
        document["tokens"] = [len(ids) for ids, _ in encoded]
        scores = config.scores(loaded.score(encoded))
        if config.labels:
            document["labels"] = config.labels
        document["scores"] = (scores if config.labels else scores[:, 0]).tolist()
    else:
        texts = [{"input": each} if _is_text(each) else each for each in inputs]
        selected = [config.prompts.select(*(each.get(key) for key in _PROMPT_KEYS)) for each in texts]
        roles = [config.prompts.role(each.get("prompt_name"), each.get("input_type")) for each in texts]
        sequences = [
            pool.encode_now([each["input"]], truncate=True, prompt=prompt, **config.text_options(role))[0]
            for each, prompt, role in zip(texts, selected, roles, strict=True)
        ]
        if config.checked == Form.DENSE:
            vectors = loaded.embed(sequences)
            document |= {"dimensions": int(vectors.shape[1]), "tokens": [len(ids) for ids in sequences]}
            document["embeddings"] = _base64(vectors)
        else:
            document |= _outputs(loaded, config, sequences, roles)
    pool.close()
    return document


def _outputs(
    loaded: Any, config: EmbeddingConfig, sequences: Sequence[Tokens], roles: Sequence[Role]
) -> dict[str, Any]:
    """Return all outputs of texts that a model was trained for."""
    lengths, found = [], []
    for sequence, role in zip(sequences, roles, strict=True):
        ids, attended = config.tokens.expand(sequence) if role == "query" and config.tokens else (sequence, 0)
        lengths.append(len(ids))
        form = config.checked | (Form.QUERY if role == "query" else Form(0))
        found.append(loaded.outputs(ids, mark(form, attended)))
    document: dict[str, Any] = {"dimensions": len(found[0].dense), "tokens": lengths}
    if Form.DENSE in config.checked:
        document["embeddings"] = _base64(each.dense for each in found)
    if Form.SPARSE in config.checked:
        document["sparse"] = [[each.ids.tolist(), each.weights.tolist()] for each in found]
    if Form.TOKENS in config.checked:
        document["token_vectors"] = _base64(each.tokens.ravel() for each in found)
    return document


def library(
    folder: Path, task: Task, max_input_tokens: int | None = None, device: str = "cpu", dtype: str = "float32"
) -> Callable[..., Any]:
    """Return the function with which the library of a task turns a text into a vector, or texts or pairs into scores.

    It loads the folder, from this machine alone, and truncates like a server with `max_input_tokens`. Raises
    `UsageError` for a folder that the server does not accept, which is where code of a model ends, and `NotReadyError`
    if the library cannot load it.
    """
    import torch

    if LIBRARIES[task] == "transformers":
        task_config.read(task, folder)
        return _pipeline(folder, max_input_tokens, device, getattr(torch, dtype))
    import sentence_transformers

    config = task_config.read(task, folder)
    pool = TokenizerPool(folder, config, threads=1)
    pool.close()
    options: dict[str, Any] = {"device": device, "trust_remote_code": False, "local_files_only": True}
    if pool.transformers_options:
        options["processor_kwargs"] = pool.transformers_options
    form = config.checked if isinstance(config, EmbeddingConfig) else None
    kind = getattr(sentence_transformers, _CLASSES[form])
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
    if form not in (Form.SPARSE, Form.TOKENS):
        return run

    def flat(item: Any, **options: Any) -> Any:
        found = run([item], **options)[0]
        return np.asarray(found.to_dense() if form == Form.SPARSE else found).ravel()

    return flat


def _pipeline(folder: Path, max_input_tokens: int | None, device: str, dtype: Any) -> Callable[..., Any]:
    """Return the scores of transformers' pipeline `text-classification` of a text or a pair, in the order of labels."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, **options)
        run: Any = transformers.pipeline("text-classification", model=loaded, tokenizer=tokenizer, device=device)
    except Exception as error:  # the files of a folder can fail in any way
        raise NotReadyError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    names = list(loaded.config.id2label.values())
    if len(set(names)) < len(names):
        raise NotReadyError(f"{folder} has two labels of the same name, which the pipeline returns without a number")
    longest = min(tokenizer.model_max_length, max_input_tokens or tokenizer.model_max_length)

    def scores(item: Any, **_: Any) -> Any:
        given = item if _is_text(item) else {"text": item[0], "text_pair": item[1]}
        found = run([given], top_k=None, truncation="longest_first", max_length=longest)[0]
        by_label = {entry["label"]: entry["score"] for entry in found}
        return np.array([by_label[name] for _, name in sorted(loaded.config.id2label.items())])

    return scores


def _encoded(pool: TokenizerPool, item: Any) -> Pair:
    """Return the ids of a text or of a pair, and where its second segment starts."""
    if not _is_text(item):
        return pool.encode_pairs_now(item[:1], item[1:], truncate=True)[0]
    (ids,) = pool.encode_now([item], truncate=True)
    return ids, len(ids)


def _next_tokens(
    folder: Path, inputs: list[Any], max_input_tokens: int | None, max_tokens: int | None, adapters: Sequence[Adapter]
) -> dict[str, Any]:
    from inferctl.serve.engines.causal import CausalModel

    loaded = CausalModel(folder)
    texts: list[list[int] | None] = []
    tokens: list[int] = []
    for text in inputs:
        if max_tokens is not None and sum(tokens) >= max_tokens:
            break
        ids = loaded.encode(text)
        texts.append(ids and ids[:max_input_tokens])
        tokens.append(len(ids or ()))

    def scored() -> list[dict[str, Any] | None]:
        return [loaded.score(ids) if ids else None for ids in texts]

    document: dict[str, Any] = {"tokens": tokens, "texts": scored()}
    for each in adapters:
        with loaded.adapted(each):
            document.setdefault("adapters", []).append(scored())
    return document


def _base64(vectors: Iterable[Any]) -> list[str]:
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]


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


def _fits(task: Task, value: Any) -> bool:
    """Return whether a value is an input for a task."""
    if task == "generate":
        return _is_prompt(value)
    head = task_config.HEADS[task]
    is_text = _is_input if task == "embed" else _is_text
    return (head.takes_texts and is_text(value)) or (head.takes_pairs and _is_pair(value))


_TASKS: tuple[Task, ...] = (*task_config.HEADS, "generate")


def main() -> int:
    """Read the inputs from stdin, write the output of the model to stdout, and return the exit code."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # spare a server on the same cores; torch reads it when it loads
    parser = Parser(prog="python -m inferctl.serve.reference")
    parser.add_argument("source")
    parser.add_argument("--task", choices=("auto", *_TASKS), default="auto")
    parser.add_argument("--max-input-tokens", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--library", action="store_true")
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    options = parser.parse_args()
    if options.library:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    else:
        hide_unused_libraries()
    hint = 'pass a JSON list of texts, such as `["first text", "second text"]`, of pairs of texts, or of chat messages'
    try:
        inputs = json.load(sys.stdin)
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}", hint) from None
    if (
        not isinstance(inputs, list)
        or not inputs
        or not any(all(_fits(task, each) for each in inputs) for task in _TASKS)
    ):
        raise UsageError("stdin is not a list of texts, of pairs of texts or of chat messages", hint)
    limits = options.max_input_tokens, options.task, options.max_tokens
    found = reference(options.source, inputs, *limits, with_library=options.library, adapters=options.adapter)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
