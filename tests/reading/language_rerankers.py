"""Rerankers that are language models with random weights, saved by sentence-transformers, which is their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny_models

QUERY_OF = '{{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}'
DOCUMENT_OF = QUERY_OF.replace("query", "document")
INSTRUCTION = 'messages | selectattr("role", "eq", "system") | map(attribute="content") | first'
# The forms of published rerankers, by what is special about each.
TEMPLATES = {
    "qwen3": "<|im_start|>system\nJudge whether the Document meets the requirements.<|im_end|>\n<|im_start|>user\n"
    f'<Instruct>: {{{{ {INSTRUCTION} | default("Given a web search query") }}}}\n<Query>: {QUERY_OF}\n'
    f"<Document>: {DOCUMENT_OF}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\n",
    # The texts are in the middle of words, and blanks around them are removed.
    "mxbai": "<|im_start|>user\nquery: {{ messages[-2].content.strip() }}\ndocument: {{ messages[-1].content | trim }}"
    "\nYou are a search relevance expert.\nRelevance:{% if add_generation_prompt %}<|im_end|>{% endif %}",
    "gemma": f"{{{{ bos_token }}}}A: {QUERY_OF}\nB: {DOCUMENT_OF}\nPredict 'Yes' or 'No'.",
    # The document comes first, and the content is a list of parts.
    "parts": "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}",
}


def make(
    folder: Path,
    architecture: str = "qwen3",
    template: str = "qwen3",
    *,
    single: bool = False,
    activation: str = "Sigmoid",
    processing: dict[str, Any] | None = None,
    classifier: bool = False,
    prompts: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a reranker and return its folder. `single`: with the logit of one token. `classifier`: with its head."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = tiny_models.make_tokenizer("qwen3")
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATES[template], 256
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2}
    known = {**sizes, **more, "vocab_size": len(tokenizer) + 4, "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    config = AutoConfig.for_model(architecture, **(known | settings))
    auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    task: Any = "sequence-classification" if classifier else "text-generation"
    options = {} if processing is None else {"processing_kwargs": {"chat_template": processing}}
    first = Transformer(str(folder / "bare"), transformer_task=task, model_kwargs={"dtype": torch.float32}, **options)
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    head = [] if classifier else [LogitScore(yes, None if single else no)]
    model = CrossEncoder(
        modules=[first, *head], device="cpu", activation_fn=getattr(torch.nn, activation)(), **(prompts or {})
    )
    model.save_pretrained(str(folder / "saved"))
    return folder / "saved"


def oracle(folder: Path) -> Any:
    """Return the CrossEncoder of sentence-transformers in fp32."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
