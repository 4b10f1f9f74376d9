"""Compare the engine, in-process, with CrossEncoder of sentence-transformers: pairs/s and the difference of the scores.

    python benchmarks/peers/rerank.py [--requests 16] [--rounds 6] [--json FILE]
    python benchmarks/peers/rerank.py --language-model [--requests 1] [--rounds 4] [--json FILE]

The model is a BERT cross-encoder of the size of all-MiniLM-L6-v2, with its tokenizer and random weights. A request is a
query with 32 documents of log-normal length (mean 55 tokens), and requests run one after the other. Each contender runs
in its own process, interleaved A B C D D C B A. Differences are those of the scores, from 0 to 1, to fp32.

`--language-model`: a reranker with the shape and the template of Qwen3-Reranker-0.6B, random weights and the vocabulary
of SmolLM2, beside transformers with a padded batch. A query has 30 documents of 100 tokens on average. The differences
are those of the first six, because fp32 takes minutes for all.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import engine
import numpy as np
import peers

CONTENDERS = (
    "inferctl bf16",
    "inferctl int8",
    "inferctl fp32",
    "sentence-transformers bf16",
    "sentence-transformers fp32",
)
DOCUMENTS = 32
LANGUAGE_CONTENDERS, LANGUAGE_DOCUMENTS = ("inferctl bf16", "transformers bf16"), 30
LANGUAGE_REFERENCES = 6
LANGUAGE_SHAPE = {  # from the published config.json of Qwen3-Reranker-0.6B
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
}
SYSTEM = """Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that \
the answer can only be "yes" or "no"."""
TEMPLATE = """<|im_start|>system
%s<|im_end|>
<|im_start|>user
<Instruct>: Given a web search query, retrieve relevant passages that answer the query
<Query>: {{ messages[0].content }}
<Document>: {{ messages[1].content }}<|im_end|>
<|im_start|>assistant
<think>

</think>


"""


def make_model(folder: Path, labels: int = 1) -> None:
    """Write the cross-encoder, or a classifier with several labels, into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    # With the usual range of 0.02, all scores are nearly equal.
    config = AutoConfig.from_pretrained(peers.MODEL, num_labels=labels, initializer_range=0.06)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(peers.MODEL / name, folder)


def make_language_model(folder: Path) -> None:
    """Write the language model into `folder`, as sentence-transformers does."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(peers.ROOT / "models" / "SmolLM2-135M-Instruct")
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE % SYSTEM, "left"
    torch.manual_seed(0)
    config = Qwen3Config(**LANGUAGE_SHAPE, vocab_size=len(tokenizer), tie_word_embeddings=True)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    package = "sentence_transformers"
    forms = {kind: {"method": "forward", "method_output_name": "logits"} for kind in ("text", "message")}
    forms["message"]["format"] = "flat"
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1", "type": f"{package}.cross_encoder.modules.logit_score.LogitScore"},
        ],
        "sentence_bert_config.json": {
            "transformer_task": "text-generation",
            "modality_config": forms,
            "module_output_name": "causal_logits",
        },
        "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
        "1/config.json": {"true_token_id": yes, "false_token_id": no},
    }
    (folder / "1").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def requests(count: int, size: int, tokens: float) -> list[tuple[str, list[str]]]:
    """Return queries of eight words, each with its documents."""
    documents, queries = peers.texts(count * size, tokens), peers.texts(count, seed=9)
    parts = [documents[start : start + size] for start in range(0, len(documents), size)]
    return [(" ".join(query.split()[:8]), part) for query, part in zip(queries, parts, strict=True)]


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--language-model", action="store_true", help="a causal model of 0.6B parameters")
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    documents, tokens = (LANGUAGE_DOCUMENTS, 100) if options.language_model else (DOCUMENTS, 55)
    contenders, write = CONTENDERS, make_model
    if options.language_model:
        contenders, write = LANGUAGE_CONTENDERS, make_language_model
    sent = requests(options.requests, documents, tokens)
    pairs = [(query, text) for query, texts in sent for text in texts]
    with tempfile.TemporaryDirectory() as temporary:
        model, file = Path(temporary) / "model", Path(temporary) / "requests.json"
        write(model)
        file.write_text(json.dumps({"requests": sent}))
        completed = subprocess.run(
            [sys.executable, "-m", "inferctl.serve.reference", str(model)],
            input=json.dumps(pairs[:LANGUAGE_REFERENCES] if options.language_model else pairs),
            capture_output=True,
            text=True,
            check=True,
        )
        reference = np.array(json.loads(completed.stdout)["scores"])
        running = engine.measure(contenders, file, lambda _: model, options.rounds)
    baseline, rows, figures = running[0], [], {}
    for contender in running:
        rate = len(pairs) / peers.median(contender.wall)
        faster = peers.median(contender.wall) / peers.median(baseline.wall)
        cpu = peers.median(contender.cpu) / peers.median(baseline.cpu)
        worst = float(np.abs(contender.vectors[: len(reference)] - reference).max())
        rows.append((contender.name, rate, faster, cpu, worst))
        figures[contender.name] = {
            "pairs_per_second": rate,
            "inferctl_bf16_is": faster,
            "inferctl_bf16_is_by_cpu_seconds": cpu,
            "score_difference_max": worst,
            "wall": contender.wall,
            "cpu": contender.cpu,
        }
    spread = {"min": float(reference.min()), "max": float(reference.max()), "std": float(reference.std())}
    peers.table(("engine", "pairs/s", "inferctl bf16 is x", "by CPU seconds x", "largest difference"), rows)
    print("fp32 scores: " + ", ".join(f"{name} {value:.4f}" for name, value in spread.items()))
    peers.write(options.json, {"pairs": len(pairs), "documents": documents, "scores": spread, "engines": figures})


if __name__ == "__main__":
    main()
