"""Small random models of many architectures, with MiniLM's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parents[1] / "benchmarks" / "corpora" / "paragraphs.jsonl"

TINY: dict[str, dict[str, Any]] = {
    "bert": {"num_attention_heads": 4},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
    "electra": {"num_attention_heads": 4, "embedding_size": 32},
    "roberta": {"num_attention_heads": 4, "pad_token_id": 1},
    "xlm-roberta": {"num_attention_heads": 4, "pad_token_id": 1},
    "mpnet": {"num_attention_heads": 4, "pad_token_id": 1},
    "modernbert": {"num_attention_heads": 4, "local_attention": 16, "global_attn_every_n_layers": 2},
    "nomic_bert": {"num_attention_heads": 4, "head_dim": 8},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
}


def make(minilm: Path, folder: Path, architecture: str, pooling: str, normalize: bool = True) -> Path:
    """Write a model of `architecture` into `folder`. `pooling` is a mode of sentence-transformers: `mean_tokens`."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 30522}
    settings = {"max_position_embeddings": 130, "pad_token_id": 0, "initializer_range": 0.5, **TINY[architecture]}
    config = AutoConfig.for_model(architecture, **sizes, **settings)
    model = AutoModel.from_config(config)
    # Random positions and tokens of a size that attention notices: near-zero weights would hide a wrong mask.
    model.save_pretrained(folder)
    shutil.copy(minilm / "tokenizer.json", folder)
    # Else transformers takes the class of the architecture, which makes other tokens of MiniLM's vocabulary.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    listing = [
        {"idx": i, "name": str(i), "path": f"{i}_{m}" if i else "", "type": f"sentence_transformers.models.{m}"}
        for i, m in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return folder


CROSS_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": TINY["bert"],
    "distilbert": TINY["distilbert"],
    "electra": TINY["electra"],
    "roberta": {**TINY["roberta"], "type_vocab_size": 1},
    "xlm-roberta": {**TINY["xlm-roberta"], "type_vocab_size": 1},
    "modernbert": {**TINY["modernbert"], "classifier_pooling": "mean"},
    "qwen3": TINY["qwen3"],
    "mpnet": TINY["mpnet"],
    "deberta-v2": {"num_attention_heads": 4, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": {"num_attention_heads": 4, "embedding_size": 32},
}


def make_cross_encoder(folder: Path, architecture: str, **settings: Any) -> Path:
    """Write a cross-encoder of `architecture` with random weights and a tokenizer of its kind into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = make_tokenizer(architecture)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    common = {"max_position_embeddings": 130, "initializer_range": 0.25, "num_labels": 1}
    ids = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id}
    options = {**sizes, **common, **CROSS_ENCODERS[architecture], **ids, **settings}
    config = AutoConfig.for_model(architecture, **options)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score", "pre_classifier", "head")) and parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, std=0.5)  # biases are zero otherwise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vocabulary(texts: list[str], splitter: Any) -> tuple[list[str], list[str]]:
    """Return the characters of the texts, and their 1,000 most frequent words of several characters."""
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return sorted({character for word in counts for character in word}), words[:1000]


def make_tokenizer(architecture: str) -> Any:
    """Return a tokenizer for the benchmark's corpus, with the model and the pair format of `architecture`.

    Equal in each process: the trainers of WordPiece and Unigram are not, so their vocabularies are counted here.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = CORPUS.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    if architecture in ("roberta", "mpnet", "xlm-roberta"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if architecture == "xlm-roberta":
        splitter = pre_tokenizers.Metaspace()
        characters, words = vocabulary(texts, splitter)
        scored = [(token, 0.0) for token in special]
        scored += [(token, -12.0) for token in characters] + [(word, -8.0) for word in words]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=special.index("<unk>")))
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.Metaspace()
    elif architecture in ("roberta", "mpnet", "modernbert", "qwen3"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    else:
        splitter, normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
        characters, words = vocabulary([normalizer.normalize_str(text) for text in texts], splitter)
        tokens = [*special, *characters, *(f"##{character}" for character in characters), *words]
        tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    start, end = special[0] if special[0] == "<s>" else "[CLS]", "</s>" if special[0] == "<s>" else "[SEP]"
    pair = f"{start} $A {end} {end} $B {end}" if start == "<s>" else f"{start}:0 $A:0 {end}:0 $B:1 {end}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=[(t, tokenizer.token_to_id(t)) for t in (start, end)]
    )
    names = ["input_ids", "attention_mask"]
    if architecture in ("bert", "electra", "deberta-v2", "albert"):
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=names,
        model_max_length=128,
        cls_token=start,
        sep_token=end,
        pad_token=next(token for token in special if "pad" in token.lower()),
        unk_token=next(token for token in special if "unk" in token.lower()),
    )


def make_generator(folder: Path, architecture: str = "llama", chat: bool = True, **settings: object) -> Path:
    """Write a generative model of `architecture` with random weights, a tokenizer and a chat template into `folder`.

    Its predictions depend on all layers: with weights of the usual size, they would be nearly uniform.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer("qwen3")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[CLS]{{ m['content'] }}[SEP]{% endfor %}[CLS]"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.25,
            **settings,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
