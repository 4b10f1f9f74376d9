"""What the hub has of the models that people deploy: the files that decide how they are served.

Those of static embeddings have the kind `static`. With `config`, they are models of model2vec.

`write` makes a folder of the same shape: its small files as published, a small tokenizer of the same kind, and random
weights with the names of the published ones. `docs/write_models.py` asks the gate of the server about each.

Facts are those of the public repositories in August 2026. MMTEB: mean over 130 of 131 tasks of MTEB(Multilingual, v2),
in percent, from embeddings-benchmark/results, 20 Aug 2026.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from inferctl.config.spec import Task
from inferctl.models.model import STATIC
from tests.tiny_models import make_tokenizer

WIDTH = 32
Json: TypeAlias = dict[str, Any]
# A module after the transformer: a Pooling by its old flag, or a class with its settings.
Module: TypeAlias = str | tuple[str, Json]


@dataclass(frozen=True)
class Shape:
    """Models of one shape.

    `scores`: names, each with its MMTEB score, None if it has none. `kind`: the `model_type` of the class of
    transformers that has these weights. `config`: keys that config.json has instead of those of the small model.
    `modules`: those after Transformer, None without modules.json. `eos`: what adds the end of a text: `json`
    (tokenizer.json), `flag` (only `add_eos_token` asks for it) or an empty text. `library`: content of
    config_sentence_transformers.json. `tokenizer`: as `make_tokenizer` names it. `layers`: BGE-M3's for weights
    and vectors of tokens. `files`: further JSON files.
    """

    scores: dict[str, float | None]
    task: Task
    kind: str
    config: Json
    modules: tuple[Module, ...] | None = None
    tokenizer: str = "qwen3"
    eos: str = "json"
    cased: bool = True
    library: Json = field(default_factory=dict)
    pickled: bool = False
    layers: bool = False
    files: dict[str, Json] = field(default_factory=dict)


# The class that uses tokenizer.json as it is. transformers rebuilds those of XLM-R, MPNet and T5 from their vocabulary,
# which that of the small tokenizers does not allow.
_FAST = "PreTrainedTokenizerFast"
# Tokenizer, and its class in tokenizer_config.json, by type of model. Decoders have that of qwen3.
_TOKENIZERS = {
    "bert": ("bert", "BertTokenizer"),
    "nomic_bert": ("bert", "BertTokenizer"),
    "distilbert": ("bert", "DistilBertTokenizer"),
    "xlm-roberta": ("xlm-roberta", _FAST),
    "gte": ("xlm-roberta", _FAST),
    "mpnet": ("mpnet", _FAST),
    "modernbert": ("modernbert", _FAST),
    "eurobert": ("modernbert", _FAST),
    "t5": ("xlm-roberta", _FAST),
    "roberta": ("roberta", _FAST),
    "bart": ("roberta", _FAST),
    "deberta-v2": ("deberta-v2", _FAST),
}
_tokenizer = cache(make_tokenizer)  # it is trained
_UNCASED = frozenset({"bert", "nomic_bert", "distilbert"})
# Which prompts a published model has is not known here: most have some.
QUERY = {"prompts": {"query": "Instruct: find passages\nQuery: ", "document": ""}, "default_prompt_name": None}
_CODE = "AutoModel"
_ROUTER = {
    "types": {
        "query_0_SparseStaticEmbedding": "sentence_transformers.sparse_encoder.models.SparseStaticEmbedding",
        "document_0_MLMTransformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
        "document_1_SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
    },
    "structure": {
        "query": ["query_0_SparseStaticEmbedding"],
        "document": ["document_0_MLMTransformer", "document_1_SpladePooling"],
    },
    "parameters": {"default_route": "document"},
}


def _embed(
    kind: str,
    modules: tuple[Module, ...] | None,
    scores: dict[str, float | None],
    config: Json | None = None,
    **more: Any,
) -> Shape:
    return _shape("embed", kind, modules, scores, config or {}, more)


def _rerank(kind: str, name: str, config: Json, modules: tuple[Module, ...] | None = None, **more: Any) -> Shape:
    return _shape("rerank", kind, modules, {name: None}, config, more)


def _classify(kind: str, name: str, *labels: str, **config: Any) -> Shape:
    return _shape("classify", kind, None, {name: None}, {"id2label": dict(_numbered(labels)), **config}, {})


def _numbered(labels: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    return ((str(number), label) for number, label in enumerate(labels))


def _shape(
    task: Task, kind: str, modules: tuple[Module, ...] | None, scores: dict[str, float | None], config: Json, more: Json
) -> Shape:
    more = {"tokenizer": _TOKENIZERS.get(kind, ("qwen3",))[0], "cased": kind not in _UNCASED} | more
    return Shape(scores, task, kind, config, modules, **more)


def _names(prefix: str, **scores: float | None) -> dict[str, float | None]:
    """Return names that differ in their ends: `_8B` is the end `8B`."""
    return {prefix + end.lstrip("_").replace("_", "."): score for end, score in scores.items()}


def _named(*names: str) -> dict[str, float | None]:
    return dict.fromkeys(names)


def _code(name: str, **config: Any) -> Json:
    """Return config.json of a model with code of its own."""
    return {"auto_map": {_CODE: name}, "architectures": [name.rpartition(".")[2]], **config}


def _scores(true: int, false: int | None) -> Module:
    name = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    return name, {"true_token_id": true, "false_token_id": false}


def _dense(inputs: int, outputs: int, activation: str, **more: Any) -> Module:
    name = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    return "Dense", {"in_features": inputs, "out_features": outputs, "bias": True, "activation_function": name, **more}


_MEAN, _CLS, _LAST = (("mean_tokens", "Normalize"), ("cls_token", "Normalize"), ("lasttoken", "Normalize"))
_LM = {"architectures": ["MistralModel"]}
_ONE_SCORE = {"id2label": {"0": "LABEL_0"}}
# Files with which sentence-transformers scores pairs by the next token of a language model.
_PAIR = "{{ messages[-2].content }}\n{{ messages[-1].content }}\n"
_LOGITS: Json = {"method": "forward", "method_output_name": "logits"}
_IN_TEMPLATE: dict[str, Json] = {
    "sentence_bert_config.json": {
        "transformer_task": "text-generation",
        "modality_config": {"text": _LOGITS, "message": {**_LOGITS, "format": "flat"}},
        "module_output_name": "causal_logits",
    },
    "tokenizer_config.json": {"chat_template": _PAIR},
}

SHAPES: tuple[Shape, ...] = (
    _embed("gemma3_text", _LAST, _names("microsoft/harrier-oss-v1-", _27b=74.2, _270m=66.5), library=QUERY),
    _embed("qwen3", _LAST, {"microsoft/harrier-oss-v1-0.6b": 69.0}, library=QUERY),
    _embed(
        "gemma3_text", _LAST, {"tencent/KaLM-Embedding-Gemma3-12B-2511": 72.2}, {"use_bidirectional_attention": True},
        library=QUERY,
    ),
    _embed("qwen3", _LAST, _names("Qwen/Qwen3-Embedding-", _8B=70.7, _4B=69.5, _0_6B=64.5), library=QUERY),
    _embed(
        "llama", ("mean_tokens", "Normalize"), {"nvidia/llama-embed-nemotron-8b": 69.5},
        _code("llama_bidirectional_model.LlamaBidirectionalModel", model_type="llama_bidirec", pooling="avg"),
        eos="", library=QUERY,
    ),
    _embed(
        "qwen3", _LAST,
        _names("codefuse-ai/F2LLM-v2-", _14B=68.8, _8B=68.1, _4B=67.1, _1_7B=65.3, _0_6B=62.8, _330M=61.0),
        eos="flag", library=QUERY,
    ),
    _embed(
        "qwen3", _LAST,
        {"bflhc/Octen-Embedding-8B": 67.8, "ICT-TIME-and-Querit/ICT-TIME-Querit": 64.0,
            "ICT-TIME-and-Querit/BOOM_4B_v1": 63.7},
        library=QUERY,
    ),
    _embed(
        "qwen3", _LAST, {"jinaai/jina-embeddings-v5-text-small": 67.2},
        _code("modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"), library=QUERY,
    ),
    _embed(
        "eurobert", _LAST, {"jinaai/jina-embeddings-v5-text-nano": 65.8},
        _code("modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"), library=QUERY,
    ),
    _embed(
        "qwen3", _MEAN, _names("BidirLM/BidirLM-", _Omni=63.8, _1_7B=63.6, _0_6B=60.5),
        _code("modeling_bidirlm.BidirLMModel"), eos="",
    ),
    _embed("gemma3_text", _MEAN, {"BidirLM/BidirLM-1B": 63.1}, _code("modeling_bidirlm.BidirLMModel"), eos=""),
    _embed("xlm-roberta", _MEAN, {"intfloat/multilingual-e5-large-instruct": 63.2,
        "intfloat/multilingual-e5-large": 58.9}),
    _embed(
        "qwen2", _LAST, {"Alibaba-NLP/gte-Qwen2-7B-instruct": 62.6},
        _code("modeling_qwen.Qwen2Model", is_causal=False), eos="flag", library=QUERY,
    ),
    _embed(
        "qwen2", _LAST, {"Alibaba-NLP/gte-Qwen2-1.5B-instruct": 60.0},
        _code("modeling_qwen.Qwen2Model", is_causal=False, hidden_size=1536), eos="flag", library=QUERY,
    ),
    _embed(
        "mistral", _LAST,
        {"Linq-AI-Research/Linq-Embed-Mistral": 61.9, "intfloat/e5-mistral-7b-instruct": 60.2},
        _LM, eos="flag", library=QUERY,
    ),
    _embed("mistral", ("lasttoken",), {"Salesforce/SFR-Embedding-Mistral": 61.2}, _LM, eos="flag"),
    _embed(
        "gemma3_text",
        ("mean_tokens", _dense(WIDTH, 4 * WIDTH, "Identity", bias=False), _dense(4 * WIDTH, WIDTH, "Identity",
            bias=False), "Normalize"),
        {"google/embeddinggemma-300m": 61.5}, {"use_bidirectional_attention": True}, library=QUERY,
    ),
    _embed(
        "xlm-roberta", _MEAN, {"Lajavaness/bilingual-embedding-large": 61.2},
        _code("modeling.BilingualModel", model_type="bilingual"),
    ),
    _embed(
        "mistral", None, {"GritLM/GritLM-7B": 61.0},
        _code("modeling_gritlm7b.MistralModel") | {"architectures": ["MistralForCausalLM"]}, eos="",
    ),
    _embed("xlm-roberta", _CLS, {"BAAI/bge-m3": 59.7}, pickled=True, layers=True),
    _embed("bert", _MEAN, _named("intfloat/e5-large-v2", "intfloat/e5-base-v2", "intfloat/e5-small-v2")),
    _embed(
        "gte", _CLS, {"Alibaba-NLP/gte-multilingual-base": 58.3},
        _code("Alibaba-NLP/new-impl--modeling.NewModel", model_type="new"),
    ),
    _embed(
        "gte", _CLS, {"Snowflake/snowflake-arctic-embed-m-v2.0": None},
        _code("modeling_hf_alibaba_nlp_gte.GteModel"), library=QUERY,
    ),
    _embed(
        "gte", ("mean_tokens", _dense(WIDTH, WIDTH, "Identity")), _named("NovaSearch/stella_en_400M_v5"),
        _code("modeling.NewModel", model_type="new"), tokenizer="bert", cased=False, library=QUERY,
    ),
    _embed("nomic_bert", ("mean_tokens",), _named("nomic-ai/nomic-embed-text-v1.5"),
        _code("nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel")),
    _embed(
        "nomic_bert", ("mean_tokens", "Normalize"), {"nomic-ai/nomic-embed-text-v2-moe": 58.1},
        _code("nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel", num_experts=8, moe_every_n_layers=2),
    ),
    _embed(
        "xlm-roberta", _MEAN, {"jinaai/jina-embeddings-v3": 58.5},
        _code("jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"),
    ),
    _embed("mistral", None, {"nvidia/NV-Embed-v2": 56.8}, _code("modeling_nvembed.NVEmbedModel", model_type="nvembed")),
    _embed(
        "bert", ("mean_tokens",), _named("jinaai/jina-embeddings-v2-base-en"),
        _code("jinaai/jina-bert-implementation--modeling_bert.JinaBertModel", position_embedding_type="alibi"),
    ),
    _embed("qwen2", None, _named("jinaai/jina-embeddings-v4"),
        _code("modeling_jina_embeddings_v4.JinaEmbeddingsV4Model", model_type="qwen2_5_vl")),
    _embed("xlm-roberta", _CLS, {"Snowflake/snowflake-arctic-embed-l-v2.0": 57.2}, library=QUERY),
    _embed("bert", _CLS, _named("Snowflake/snowflake-arctic-embed-m"), library=QUERY),
    _embed("bert", ("cls_token",), _named("mixedbread-ai/mxbai-embed-large-v1"), library=QUERY),
    _embed("bert", _CLS, _named(*(f"BAAI/bge-{size}-en-v1.5" for size in ("small", "base", "large")))),
    _embed(
        "qwen2", ("mean_tokens", _dense(WIDTH, WIDTH, "Identity")), {"NovaSearch/stella_en_1.5B_v5": 56.7},
        _code("modeling_qwen.Qwen2Model", is_causal=False, hidden_size=1536), eos="flag", library=QUERY,
    ),
    _embed("modernbert", _CLS, {"ibm-granite/granite-embedding-311m-multilingual-r2": 56.0}),
    _embed("modernbert", ("cls_token",), _named("Alibaba-NLP/gte-modernbert-base")),
    _embed("modernbert", _MEAN, _named("nomic-ai/modernbert-embed-base")),
    _embed("bert", _MEAN, _named("sentence-transformers/all-MiniLM-L6-v2")),
    _embed("mpnet", _MEAN, _named("sentence-transformers/all-mpnet-base-v2")),
    _embed("bert", ("cls_token", _dense(WIDTH, WIDTH, "Tanh"), "Normalize"), _named("sentence-transformers/LaBSE"),
        cased=True),
    _embed(
        "t5", ("mean_tokens", _dense(WIDTH, WIDTH, "Identity", bias=False), "Normalize"),
        _named("sentence-transformers/sentence-t5-base", "sentence-transformers/gtr-t5-base"),
    ),
    _embed(
        "t5", ("mean_tokens", _dense(WIDTH, WIDTH, "Identity", bias=False), "Normalize"),
            _named("hkunlp/instructor-large"),
        pickled=True,
    ),
    _embed(
        "static", ("Normalize",), _named("minishlab/potion-base-8M"),
        {"model_type": "model2vec", "architectures": ["StaticModel"]}, tokenizer="bert",
    ),
    _embed("static", (), _named("sentence-transformers/static-retrieval-mrl-en-v1"), tokenizer="bert"),
    _embed("gemma2", _LAST, _named("BAAI/bge-multilingual-gemma2"), {"architectures": ["Gemma2Model"]}, library=QUERY),
    _rerank("xlm-roberta", "BAAI/bge-reranker-v2-m3", _ONE_SCORE),
    _rerank("modernbert", "Alibaba-NLP/gte-reranker-modernbert-base", _ONE_SCORE),
    _rerank(
        "bert", "cross-encoder/ms-marco-MiniLM-L6-v2",
        _ONE_SCORE | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    ),
    _rerank(
        "modernbert", "cross-encoder/ettin-reranker-150m-v1", {},
        (
            "cls_token", _dense(WIDTH, WIDTH, "GELU", bias=False), ("LayerNorm", {"dimension": WIDTH}),
            _dense(WIDTH, 1, "Identity", module_output_name="scores"),
        ),
        library={"model_type": "CrossEncoder"},
    ),
    _rerank(
        "qwen3", "Qwen/Qwen3-Reranker-0.6B", {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
        (_scores(9, 11),), library={"model_type": "CrossEncoder"},
        files=_IN_TEMPLATE | {"tokenizer_config.json": {"chat_template": "{{ messages[:-2] }}\n" + _PAIR}},
    ),
    _rerank(
        "qwen3", "zeroentropy/zerank-2", {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
        (_scores(9, None),), files=_IN_TEMPLATE,
        library={"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"},
    ),
    _rerank("qwen2", "mixedbread-ai/mxbai-rerank-base-v2", {"architectures": ["Qwen2ForCausalLM"]}),
    _rerank("gemma", "BAAI/bge-reranker-v2-gemma", {"architectures": ["GemmaForCausalLM"]}),
    _rerank(
        "xlm-roberta", "jinaai/jina-reranker-v2-base-multilingual",
        _ONE_SCORE | {
            "auto_map": {
                "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification"
            }
        },
    ),
    _rerank(
        "llama", "BAAI/bge-reranker-v2-minicpm-layerwise",
        _code("modeling_minicpm_reranker.LayerWiseMiniCPMForCausalLM", model_type="minicpm"),
    ),
    _rerank("qwen3", "jinaai/jina-reranker-v3", _code("modeling.JinaForRanking")),
    _rerank(
        "gte", "Alibaba-NLP/gte-multilingual-reranker-base",
        _ONE_SCORE | {
            "model_type": "new", "architectures": ["NewForSequenceClassification"],
            "auto_map": {
                "AutoModelForSequenceClassification": "Alibaba-NLP/new-impl--modeling.NewForSequenceClassification"
            },
        },
    ),
    _classify("distilbert", "distilbert/distilbert-base-uncased-finetuned-sst-2-english", "NEGATIVE", "POSITIVE"),
    _classify("roberta", "cardiffnlp/twitter-roberta-base-sentiment-latest", "negative", "neutral", "positive"),
    _classify(
        "bert", "unitary/toxic-bert", "toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate",
        problem_type="multi_label_classification",
    ),
    _classify("deberta-v2", "MoritzLaurer/deberta-v3-large-zeroshot-v2.0", "entailment", "not_entailment"),
    _classify("deberta-v2", "cross-encoder/nli-deberta-v3-base", "contradiction", "entailment", "neutral"),
    _classify("bart", "facebook/bart-large-mnli", "contradiction", "neutral", "entailment"),
    _embed("bert", None, _named("colbert-ir/colbertv2.0", "answerdotai/answerai-colbert-small-v1"),
        {"architectures": ["HF_ColBERT"]}),
    _embed(
        "modernbert", (("pylate.models.Dense.Dense", {"in_features": WIDTH, "out_features": 16, "bias": False}),),
        _named("lightonai/GTE-ModernColBERT-v1", "lightonai/LateOn"), library={"model_type": "ColBERT"},
    ),
    _embed(
        "bert", (("sentence_transformers.sparse_encoder.models.SpladePooling", {"pooling_strategy": "max"}),),
        _named("naver/splade-v3", "naver/splade-cocondenser-ensembledistil"), {"architectures": ["BertForMaskedLM"]},
        library={"model_type": "SparseEncoder"},
    ),
    _embed(
        "distilbert", (("sentence_transformers.sparse_encoder.models.SpladePooling", {"pooling_strategy": "max"}),),
        _named("opensearch-project/opensearch-neural-sparse-encoding-doc-v3-distill"),
        {"architectures": ["DistilBertForMaskedLM"]}, library={"model_type": "SparseEncoder"},
        files={"router_config.json": _ROUTER},
    ),
    *(
        Shape({name: None}, "generate", kind, {"architectures": [f"{kind.title()}ForCausalLM"]})
        for name, kind in (("Qwen/Qwen2.5-1.5B-Instruct", "qwen2"), ("meta-llama/Llama-3.1-8B-Instruct", "llama"))
    ),
)  # fmt: skip
PUBLISHED = {name: shape for shape in SHAPES for name in shape.scores}

# Settings of a small model of any type. A class of transformers uses those that it knows.
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 130,
    "initializer_range": 0.4,
    "sliding_window": 12,
    "local_attention": 16,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 1.0,
}
_OF_ROUTER = ("config_sentence_transformers.json", "modules.json", "router_config.json")
_OTHER_SIZES = {
    "distilbert": {"dim": WIDTH, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def write(name: str, folder: Path) -> Path:
    """Write a small model of the shape of a published one into the new `folder`, and return it. The same each time."""
    import torch
    from safetensors.torch import load_file, save_file

    shape = PUBLISHED[name]
    torch.manual_seed(0)
    logits = str(shape.config.get("architectures", [""])[0]).endswith("ForMaskedLM")
    class_ = "sparse_encoder.models.MLMTransformer" if logits else "models.Transformer"
    first = {"path": "", "type": f"sentence_transformers.{class_}"}
    if shape.kind == "static":
        first = {"path": "." if shape.config else "0_StaticEmbedding", "type": f"sentence_transformers.models.{STATIC}"}
        place = folder / first["path"]
        place.mkdir(parents=True)
        _tokenizer(shape.tokenizer)._tokenizer.save(str(place / "tokenizer.json"))
        table = {
            "embeddings" if shape.config else "embedding.weight": torch.randn(len(_tokenizer(shape.tokenizer)), WIDTH)
        }
        save_file(table, place / "model.safetensors")
    else:
        _model(shape).save_pretrained(folder)
        _write_tokenizer(shape, folder)
    if shape.config or shape.kind != "static":
        _change(folder / "config.json", shape.config)
    if shape.library:
        _change(folder / "config_sentence_transformers.json", shape.library)
    if shape.modules is not None:
        listed: list[Json] = [{"idx": 0, "name": "0", **first}]
        for index, (kind, settings) in enumerate(_modules(shape.modules), 1):
            kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
            path = f"{index}_{kind.rpartition('.')[2]}"
            listed.append({"idx": index, "name": str(index), "path": path, "type": kind})
            _change(folder / path / "config.json", settings)
            if tensors := _tensors(settings):
                save_file(tensors, folder / path / "model.safetensors")
        (folder / "modules.json").write_text(json.dumps(listed))
    for file, content in shape.files.items():
        _change(folder / file, content)
    if shape.config.get("architectures") == ["HF_ColBERT"]:
        weights = load_file(folder / "model.safetensors")
        projection = {"linear.weight": torch.randn(16, WIDTH)}
        save_file(weights | projection, folder / "model.safetensors", metadata={"format": "pt"})
    if "router_config.json" in shape.files:
        _route(folder)
    if shape.layers:
        torch.save(torch.nn.Linear(WIDTH, 1).state_dict(), folder / "sparse_linear.pt")
        torch.save(torch.nn.Linear(WIDTH, 24).state_dict(), folder / "colbert_linear.pt")
    for file in list(folder.rglob("model.safetensors")) if shape.pickled else ():
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return folder


def _route(folder: Path) -> None:
    """Move a model into the folder of documents, next to the weights of queries, as a Router has it."""
    import torch
    from safetensors.torch import save_file

    query, document = folder / "query_0_SparseStaticEmbedding", folder / "document_0_MLMTransformer"
    pooling = next(folder.glob("1_SpladePooling"))
    pooling.rename(folder / "document_1_SpladePooling")
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in _OF_ROUTER]
    for place in (query, document):
        place.mkdir()
    for file in files:
        if "tokenizer" in file.name:
            (query / file.name).write_bytes(file.read_bytes())
        file.rename(document / file.name)
    size = json.loads((document / "config.json").read_text())["vocab_size"]
    save_file({"weight": torch.rand(size)}, query / "model.safetensors")
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}])
    )


def _model(shape: Shape) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    vocabulary = {
        "vocab_size": len(_tokenizer(shape.tokenizer)) + 8,
        "pad_token_id": 1 if "roberta" in shape.kind else 0,
    }
    wide = {key: shape.config[key] for key in ("hidden_size", "id2label") if key in shape.config}
    config = transformers.AutoConfig.for_model(
        shape.kind, **_SIZES | _OTHER_SIZES.get(shape.kind, {}) | vocabulary | wide
    )
    if shape.kind == "t5":
        return transformers.T5EncoderModel(config)
    if "id2label" in shape.config:
        return transformers.AutoModelForSequenceClassification.from_config(config)
    if str(shape.config.get("architectures", [""])[0]).endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM.from_config(config)
    return transformers.AutoModel.from_config(config)


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    import transformers

    _tokenizer(shape.tokenizer).save_pretrained(folder)
    settings = {"tokenizer_class": _TOKENIZERS.get(shape.kind, ("", _FAST))[1]}
    if shape.tokenizer == "bert" and shape.kind == "gte":
        settings["tokenizer_class"] = "BertTokenizer"
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if shape.eos != "json":
        content["post_processor"]["single"].pop()
    if shape.tokenizer == "bert":
        content["normalizer"]["lowercase"] = not shape.cased
        settings |= {"do_lower_case": not shape.cased}
    if shape.kind == "qwen2":  # as published: transformers uses its class for folders with code of their own
        published = json.loads(transformers.Qwen2Tokenizer().backend_tokenizer.to_str())
        content |= {name: published[name] for name in ("normalizer", "pre_tokenizer")}
    if "ColBERT" in str(shape.config) + str(shape.library):
        token = {"id": len(_tokenizer(shape.tokenizer)), "content": "[MASK]", "special": True, "single_word": False}
        content["added_tokens"].append(token | dict.fromkeys(("lstrip", "rstrip", "normalized"), False))
        settings |= {"mask_token": "[MASK]"}
    if shape.eos == "flag":
        settings |= {"add_eos_token": True, "eos_token": "[SEP]", "bos_token": "[CLS]"}
    file.write_text(json.dumps(content))
    _change(folder / "tokenizer_config.json", settings)


def _modules(listed: tuple[Module, ...]) -> Iterator[tuple[str, Json]]:
    for module in listed:
        if not isinstance(module, str):
            yield module
        elif module == "Normalize":
            yield module, {}
        else:
            yield "Pooling", {"word_embedding_dimension": WIDTH, f"pooling_mode_{module}": True}


def _tensors(settings: Json) -> dict[str, Any]:
    import torch

    if size := settings.get("dimension"):
        return {"norm.weight": torch.ones(size), "norm.bias": torch.zeros(size)}
    if "in_features" not in settings:
        return {}
    found = {"linear.weight": torch.randn(settings["out_features"], settings["in_features"])}
    return found | ({"linear.bias": torch.randn(settings["out_features"])} if settings["bias"] else {})


def _change(file: Path, changes: Json) -> None:
    file.parent.mkdir(exist_ok=True)
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))
