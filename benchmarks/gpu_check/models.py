"""Models with random weights that need no download: architectures, heads, and the shapes of real models."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "benchmarks" / "corpora" / "paragraphs.jsonl"
_SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # RoBERTa numbers positions from the id of [PAD] + 1
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
# Weights of this size make vectors depend on each token: with smaller ones, a wrong mask would not be noticed.
_COMMON: dict[str, Any] = {"initializer_range": 0.12, "max_position_embeddings": 514}
_COMMON |= {"cls_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "modernbert": {"local_attention": 64, "global_attn_every_n_layers": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},  # grouped queries, causal
}
# What else a server computes, each by a published model of which a small one of the same shape is made.
HEADS = {
    "SPLADE": "naver/splade-v3",
    "BGE-M3": "BAAI/bge-m3",
    "ColBERT": "answerdotai/answerai-colbert-small-v1",
    "language model as reranker": "Qwen/Qwen3-Reranker-0.6B",
    "T5": "sentence-transformers/sentence-t5-base",
    "soft cap": "BAAI/bge-multilingual-gemma2",
    "static embeddings": "minishlab/potion-base-8M",
}
# Layers, width and heads of all-MiniLM-L6-v2, bge-base and Qwen3-Embedding-0.6B.
SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "bge-base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128},
}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(folder: Path, architecture: str, *, task: str = "embed", **settings: Any) -> Path:
    """Write a model, if the folder does not have one, and return the folder. `task`: embed or rerank."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer), **_SIZES, **_COMMON, **ARCHITECTURES.get(architecture, {}), **settings}
    labels = {"num_labels": 1} if task == "rerank" else {}
    config = AutoConfig.for_model(architecture, **options, **labels)
    auto: Any = AutoModelForSequenceClassification if task == "rerank" else AutoModel
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if task == "embed":
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{m}" if i else "", "type": f"x.{m}"}
            for i, m in enumerate(("Transformer", "Pooling"))
        ]
        (folder / "modules.json").write_text(json.dumps(modules).replace("x.", "sentence_transformers.models."))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": options["hidden_size"], "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def head(folder: Path, name: str) -> Path:
    """Write the small model of `HEADS[name]` that the tests have too, if there is none, and return its folder."""
    import torch

    from inferctl.models import convert
    from inferctl.models.model import ModelFolder

    # Packages that install a module `tests` would hide the folder.
    sys.modules.setdefault("tests", ModuleType("tests")).__path__ = [str(ROOT / "tests")]
    from tests import published_models

    converted = folder.with_name(f"{folder.name}-converted")
    if not folder.is_dir():
        published_models.write(HEADS[name], folder)
        if (layer := folder / "sparse_linear.pt").is_file():  # random weights are near zero, where bf16 has no digits
            torch.save({key: value + 2 * (key == "bias") for key, value in torch.load(layer).items()}, layer)
        if convert.needed(ModelFolder(folder)):  # BGE-M3 has pickles
            convert.convert(folder, converted, lambda *_: None)
    return converted if converted.is_dir() else folder


def texts(count: int, words: int = 40) -> list[str]:
    """Return different texts of the corpus, of about `words` words."""
    lines = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    stream = " ".join(lines).split()
    sizes = [1 + (words * (7 * index % 20)) // 10 for index in range(count)]
    starts = [(613 * index) % (len(stream) - max(sizes)) for index in range(count)]
    return [" ".join(stream[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _tokenizer() -> Any:
    """Return a tokenizer of the words and characters of the corpus, in the format of BERT."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    lines = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    counts = Counter(w for text in lines for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:8000]
    tokens = [*_SPECIAL, *characters, *(f"##{character}" for character in characters), *words]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
