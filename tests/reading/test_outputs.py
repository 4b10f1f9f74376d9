"""Sparse weights and vectors of tokens equal those of sentence-transformers, or of the formulas of BGE-M3."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.core.errors import UsageError
from inferctl.models import convert
from inferctl.models import model as model_folder
from inferctl.reading import outputs as outputs_module
from inferctl.reading import task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, Outputs, Role, mark, top, unpack
from inferctl.serve.api.embedding_outputs import held
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.api.tokenize import tokenize
from inferctl.serve.backend.local_backend import LocalBackend, Stack
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import engines, tiny_models
from tests.latency_models import learned
from tests.processes import ServerProcess
from tests.reading import saved_models
from tests.reading.saved_models import WIDTH
from tests.reading.test_saved_models import LIBRARY, SETTINGS, edit

TEXTS = [text for text in saved_models.TEXTS if text]
ROLES: tuple[Role, ...] = ("query", "document", None)


base = partial(saved_models.write, mask=True)


def computed(folder: Path, role: Role, texts: list[str] = TEXTS, precision: str = "fp32") -> list[Outputs]:
    """Return what an engine computes for texts."""
    config = task_config.read("embed", folder)
    assert isinstance(config, EmbeddingConfig)
    engine, info = engines.loaded(folder, precision)
    pool = TokenizerPool(folder, config, threads=1)
    prompt = config.prompts.select(input_type=role)
    form = config.checked | (Form.QUERY if role == "query" else Form(0))
    ids, marks = [], []
    for found in pool.encode_now(texts, truncate=True, prompt=prompt, **config.text_options(role)):
        sequence, attended = config.tokens.expand(found) if role == "query" and config.tokens else (found, 0)
        ids.append(sequence)
        marks.append(mark(form, attended))
    pool.close()
    rows = engine.run(engines.batch(ids, marks)).rows
    return [unpack(row, form, info.dimensions, info.token_dimensions) for row in rows]


def matrix(found: list[Outputs], width: int) -> Any:
    rows = np.zeros((len(found), width), np.float32)
    for row, outputs in zip(rows, found, strict=True):
        row[outputs.ids] = outputs.weights
    return rows


def encoder(kind: str, folder: Path) -> Any:
    import sentence_transformers
    import torch

    cls = getattr(sentence_transformers, kind, None)
    if cls is None:
        from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder as cls  # noqa: N813
    return cls(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def encode(library: Any, role: Role, texts: list[str] = TEXTS) -> Any:
    function = library.encode if role is None else getattr(library, f"encode_{role}")
    return function(texts)


def same_weights(folder: Path, original: Path | None = None, texts: list[str] = TEXTS) -> None:
    library = encoder("SparseEncoder", original or folder)
    for role in ROLES:
        expected = encode(library, role, texts).to_dense().numpy()
        found = matrix(computed(folder, role, texts), expected.shape[1])
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, expected.max()))
        assert np.abs(found - expected)[(found > 0) != (expected > 0)].max(initial=0) < 1e-5


def same_vectors(folder: Path) -> None:
    library = encoder("MultiVectorEncoder", folder)
    for role in ROLES:
        for expected, found in zip(encode(library, role), computed(folder, role), strict=True):
            np.testing.assert_allclose(found.tokens, np.asarray(expected), atol=1e-5)


def write_splade(folder: Path, architecture: str, **options: Any) -> Path:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    source = base(folder / "model", architecture, "AutoModelForMaskedLM")
    modules = [Transformer(str(source), transformer_task="fill-mask"), SpladePooling(**options)]
    SparseEncoder(modules=modules, device="cpu").save(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {}),
        ("bert", {"pooling_strategy": "sum"}),
        ("distilbert", {"activation_function": "log1p_relu"}),
        ("distilbert", {"pooling_strategy": "sum", "activation_function": "log1p_relu"}),
        ("xlm-roberta", {}),
        ("modernbert", {}),
        ("deberta-v2", {}),
    ],
)
def test_splade(architecture: str, options: dict[str, str], tmp_path: Path) -> None:
    same_weights(write_splade(tmp_path, architecture, **options))


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_only_so_many_weights_as_the_model_keeps(strategy: str, tmp_path: Path) -> None:
    folder = write_splade(tmp_path, "bert", pooling_strategy=strategy)
    edit(folder / LIBRARY, {"max_active_dims": 12})
    same_weights(folder)
    assert all(len(found.ids) == 12 for found in computed(folder, None))


def test_the_real_splade(splade: Path) -> None:
    same_weights(splade)
    (found,) = computed(splade, "query", ["Which river flows through Vienna?"])
    assert len(found.ids) == 16  # as published with the package
    # In bf16, the largest weights move by less than their rank.
    exact, rounded = matrix(computed(splade, None), 30522), matrix(computed(splade, None, precision="bf16"), 30522)
    cosines = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosines.min() > 0.995


def test_a_long_text_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines import output_heads

    monkeypatch.setattr(output_heads, "_LOGITS_BYTES", 4 * 1101 * 7)  # seven tokens at a time
    same_weights(write_splade(tmp_path, "bert"))
    same_weights(write_splade(tmp_path / "sum", "bert", pooling_strategy="sum"))


@pytest.mark.parametrize("longest", [300, 9])  # above and below the limit of documents
def test_stored_weights_of_queries(longest: int, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    source = base(tmp_path / "model", "bert", "AutoModelForMaskedLM")
    document = Transformer(str(source), transformer_task="fill-mask")
    weights = torch.rand(len(document.tokenizer))
    weights[::5] = 0
    router = Router.for_query_document(
        [SparseStaticEmbedding(document.tokenizer, weight=weights)],
        [document, SpladePooling(activation_function="log1p_relu")],
    )
    saved = tmp_path / "saved"
    SparseEncoder(modules=[router], device="cpu", max_active_dims=9).save(str(saved))
    (tokenizer,) = saved.glob("query_*/tokenizer_config.json")
    edit(tokenizer, {"model_max_length": longest})
    with pytest.raises(model_folder.UnconvertedError, match="Router"):
        model_folder.find(str(saved))
    converted = convert.convert(saved, tmp_path / "converted", lambda *_: None).path
    same_weights(converted, saved, [*TEXTS, "the " * 200 + "river flows " * 60 + "through Vienna"])
    # A query with a token that has no weight failed in the engine.
    from safetensors.torch import save_file

    (file,) = converted.glob("query_*/model.safetensors")
    save_file({"weight": weights[: len(weights) - 1].clone()}, file)
    with pytest.raises(UsageError, match="weights for 1092"):
        computed(converted, "document", ["ok"])


def test_a_router_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    source = base(tmp_path / "model", "bert", "AutoModelForMaskedLM")
    routes = [[Transformer(str(source), transformer_task="fill-mask"), SpladePooling()] for _ in range(2)]
    SparseEncoder(modules=[Router.for_query_document(*routes)], device="cpu").save(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="for queries and"):
        convert.convert(tmp_path / "saved", tmp_path / "converted", lambda *_: None)
    file = tmp_path / "saved" / "router_config.json"
    routes_of = json.loads(file.read_text())
    file.write_text(json.dumps(routes_of | {"types": [1]}))
    with pytest.raises(UsageError, match="`types`"):
        convert.convert(tmp_path / "saved", tmp_path / "converted", lambda *_: None)
    for structure in ({"query": ["a"]}, {"query": ["../.."], "document": ["../.."]}, []):
        file.write_text(json.dumps(routes_of | {"structure": structure}))
        with pytest.raises(UsageError):
            model_folder.find(str(tmp_path / "saved"))


EXPANSION = {"strategy": "fixed", "length": 24, "token": "[MASK]"}


def multi_vector(folder: Path, architecture: str, words: list[str], options: dict[str, Any], **more: Any) -> Path:
    import torch
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.model import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    first = Transformer(str(base(folder / "model", architecture)), **options)
    token = "token_embeddings"
    dense = Dense(WIDTH, 8, bias=False, activation_function=torch.nn.Identity(), module_input_name=token)
    modules = [first, dense, MultiVectorMask(skiplist_words=words, **more), Normalize(token)]
    prompts = {"query": "[Q] ", "document": "[D] "}
    MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts).save(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize(
    ("architecture", "words", "options", "more"),
    [
        ("bert", [], {}, {}),
        ("bert", [",", "the"], {"query_expansion": EXPANSION}, {}),
        ("modernbert", ["the"], {"query_expansion": EXPANSION}, {"skiplist_tasks": ["query", "document"]}),
        ("xlm-roberta", [], {"query_expansion": EXPANSION, "document_length": 20}, {}),
        ("distilbert", [], {"query_expansion": {**EXPANSION, "attend": True}}, {}),
        ("roberta", [], {"query_expansion": {**EXPANSION, "strategy": "min"}, "query_length": 40}, {}),
        ("electra", [], {"query_length": 10, "document_length": 50}, {}),
    ],
)
def test_vectors_of_tokens(
    architecture: str, words: list[str], options: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    if "query_expansion" in options:
        tokenizer = tiny_models.make_tokenizer(architecture)
        token = tokenizer.mask_token or "[MASK]"
        options = options | {"query_expansion": options["query_expansion"] | {"token": token}}
    same_vectors(multi_vector(tmp_path, architecture, words, options, **more))


def test_more_tokens_for_a_query_than_the_model_accepts(tmp_path: Path) -> None:
    folder = multi_vector(tmp_path, "bert", [], {"query_expansion": EXPANSION})
    assert task_config.read("embed", folder, EXPANSION["length"]).max_tokens == EXPANSION["length"]
    for limit, length in ((16, EXPANSION["length"]), (None, 10**9)):
        edit(folder / SETTINGS, {"query_expansion": EXPANSION | {"length": length}})
        with pytest.raises(UsageError, match="above the limit"):
            task_config.read("embed", folder, limit)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_query_expansion": False},
        {"attend_to_expansion_tokens": True},
        {"model_type": None},
        {"document_length": 100, "query_length": 120},
    ],
)
def test_pylate(settings: dict[str, Any], tmp_path: Path) -> None:
    """The layout of PyLate 3, which lists Transformer and Dense alone."""
    saved = multi_vector(tmp_path, "bert", [], {})
    for name in ("2_MultiVectorMask", "3_Normalize"):
        shutil.rmtree(saved / name)
    edit(saved / "1_Dense" / "config.json", {}, without=("module_input_name", "module_output_name"))
    types = ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense")
    listing = [
        {"idx": index, "name": str(index), "path": "1_Dense" if index else "", "type": each}
        for index, each in enumerate(types)
    ]
    (saved / "modules.json").write_text(json.dumps(listing))
    config = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20}
    config |= {"document_length": 60, "skiplist_words": [",", "the"], **settings}
    (saved / LIBRARY).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    # PyLate saves the length without the marker.
    edit(saved / SETTINGS, {"max_seq_length": config["document_length"] - 1})
    same_vectors(with_markers(saved, ["[Q] ", "[D] "]))


def with_markers(folder: Path, tokens: list[str]) -> Path:
    """Add the markers of queries and documents to a tokenizer as PyLate does: the normalizer sees them first."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in tokens])
    tokenizer.save_pretrained(folder)
    return folder


def with_vocabulary_of_bert(folder: Path) -> Path:
    """Write the tokenizer files of bert-base-uncased: the markers are in the vocabulary, and no added tokens."""
    from transformers import BertTokenizer

    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    file = folder.parent / "vocab.txt"
    file.write_text("\n".join([*special, *(word for word in words if word not in special)][: len(words)]))
    BertTokenizer(vocab=str(file), model_max_length=128).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("metadata", [None, {"query_maxlen": 16, "doc_maxlen": 40, "mask_punctuation": False}])
@pytest.mark.parametrize("kind", ["added tokens", "vocabulary"])
def test_stanford(metadata: dict[str, Any] | None, kind: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = base(tmp_path / "model", "bert")
    folder = (
        with_vocabulary_of_bert(folder) if kind == "vocabulary" else with_markers(folder, ["[unused0]", "[unused1]"])
    )
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(1)
    weights["linear.weight"] = torch.randn(8, WIDTH)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", {"architectures": ["HF_ColBERT"]})
    if metadata is not None:
        (folder / "artifact.metadata").write_text(json.dumps(metadata))
    same_vectors(folder)


@pytest.fixture(scope="module")
def bge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BGE-M3 in small, as its repository has it: all weights are pickles."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = tmp_path_factory.mktemp("bge")
    first = Transformer(str(base(folder / "model", "xlm-roberta")))
    modules = [first, Pooling(WIDTH, "cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "saved"))
    saved = folder / "saved"
    torch.save(first.auto_model.state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    torch.manual_seed(2)
    torch.save(torch.nn.Linear(WIDTH, 1).state_dict(), saved / "sparse_linear.pt")
    torch.save(torch.nn.Linear(WIDTH, 24).state_dict(), saved / "colbert_linear.pt")
    return saved


def flag_embedding(folder: Path, texts: list[str]) -> list[tuple[Any, dict[int, float], Any]]:
    """Return dense vector, weights and vectors of tokens by the formulas of FlagEmbedding's M3 model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    heads = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("sparse_linear", "colbert_linear")]
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    results = []
    for text in texts:
        given = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**given).last_hidden_state[0]
        dense = torch.nn.functional.normalize(hidden[0], dim=0)
        weights = torch.relu(hidden @ heads[0]["weight"].T + heads[0]["bias"])[:, 0]
        by_id: dict[int, float] = {}
        for token, weight in zip(given["input_ids"][0].tolist(), weights.tolist(), strict=True):
            if token not in unused and weight > by_id.get(token, 0):
                by_id[token] = weight
        vectors = torch.nn.functional.normalize(hidden[1:] @ heads[1]["weight"].T + heads[1]["bias"], dim=-1)
        results.append((dense.numpy(), by_id, vectors.numpy()))
    return results


@pytest.fixture(scope="module")
def converted_bge(bge: Path) -> Path:
    return convert.convert(bge, bge.parent / "converted", lambda *_: None).path


def test_three_outputs_of_one_forward_pass(bge: Path, converted_bge: Path) -> None:
    found = computed(converted_bge, None)
    for outputs, (dense, by_id, vectors) in zip(found, flag_embedding(bge, TEXTS), strict=True):
        np.testing.assert_allclose(outputs.dense, dense, atol=1e-5)
        assert dict(zip(outputs.ids.tolist(), outputs.weights, strict=True)) == pytest.approx(by_id, abs=1e-5)
        np.testing.assert_allclose(outputs.tokens, vectors, atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), [("sparse_linear", (2, WIDTH)), ("colbert_linear", (24, WIDTH + 1))])
def test_layers_of_another_width_are_refused(
    layer: str, shape: tuple[int, int], converted_bge: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    folder = Path(shutil.copytree(converted_bge, tmp_path / "changed"))
    weights = {"linear.weight": np.ones(shape, np.float32), "linear.bias": np.ones(shape[0], np.float32)}
    save_file(weights, folder / layer / "model.safetensors")
    with pytest.raises(UsageError, match=f"states of {WIDTH}"):
        task_config.read("embed", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1_SpladePooling/config.json": {"pooling_strategy": "mean"}}, "SpladePooling with 'mean'"),
        ({"1_SpladePooling/config.json": {"activation_function": "gelu"}}, "'gelu'"),
        ({"sentence_bert_config.json": {"transformer_task": "feature-extraction"}}, "made for feature-extraction"),
        ({"modules.json": []}, "lists no modules"),
        ({"config_sentence_transformers.json": {"model_type": "SentenceTransformer"}}, "made for fill-mask"),
    ],
)
def test_a_changed_sparse_encoder_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_splade(tmp_path, "bert")
    for name, content in change.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        task_config.read("embed", folder)


def test_responses_that_nobody_reads_hold_a_bounded_number_of_vectors() -> None:
    model = ServedModel("m", "m", (), None, 1, 1, truncate=True)
    large = Outputs(tokens=np.empty((2**20, 40), np.float32)).size
    with held(model, large):
        with pytest.raises(ApiError) as rejected, held(model, large):
            pass
        assert rejected.value.status == 429
        with held(model, Outputs().size):  # it has none
            pass
    with held(model, large):  # they were sent
        pass
    assert model.held_numbers == 0


def test_the_largest_weights_are_kept() -> None:
    ids, weights = np.array([1, 4, 6, 9]), np.array([0.5, 2.0, 0.1, 0.5], np.float32)
    cases: list[tuple[int | None, float | None, list[int]]] = [
        (None, None, [1, 4, 6, 9]),
        (2, None, [1, 4]),
        (9, None, [1, 4, 6, 9]),
        (None, 0.5, [1, 4, 9]),
        (1, 0.5, [4]),
        (3, 5.0, []),
    ]
    for count, least, wanted in cases:
        found, values = top(ids, weights, count, least)
        assert found.tolist() == wanted
        assert values.tolist() == weights[np.isin(ids, wanted)].tolist()


# The API.


def spec(place: Path, folder: Path) -> Path:
    """Write a spec with a cache."""
    file = place / "inferctl.yaml"
    file.write_text(f"name: outputs\nmodel: {{source: {folder}}}\ncache: {{size: 64MB}}\n")
    return file


def test_sparse_api(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    folder = write_splade(tmp_path / "splade", "bert")
    expected = matrix(computed(folder, "document"), 2000)
    server = serve("--spec", str(spec(tmp_path, folder)), "--precision", "fp32")
    body = {"input": TEXTS, "input_type": "document"}
    response = server.embed(**body).json()
    assert [entry.keys() for entry in response["data"]] == [{"object", "index", "sparse_embedding"}] * len(TEXTS)
    for entry, row in zip(response["data"], expected, strict=True):
        found = entry["sparse_embedding"]
        assert found["indices"] == np.flatnonzero(row).tolist()
        np.testing.assert_allclose(found["values"], row[found["indices"]], atol=1e-5)
    again = server.embed(**body)
    assert again.json()["data"] == response["data"]
    assert int(again.headers["x-inferctl-cached-tokens"]) == response["usage"]["total_tokens"]

    few = server.embed(**body, outputs=["sparse"], top_k=3).json()["data"][0]["sparse_embedding"]
    assert few["indices"] == sorted(np.argsort(-expected[0], kind="stable")[:3].tolist())
    tokens = server.embed(**body, sparse_format="tokens", top_k=3).json()["data"][0]["sparse_embedding"]
    assert list(tokens.values()) == few["values"]
    text = server.embed(**body, sparse_format="pgvector", top_k=3).json()["data"][0]["sparse_embedding"]
    info = server.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "splade"}}
    size = info["model"]["vocabulary_size"]
    listed = ",".join(f"{i + 1}:{v}" for i, v in zip(few["indices"], few["values"], strict=True))
    assert text == f"{{{listed}}}/{size}"
    least = server.embed(**body, min_weight=few["values"][0]).json()["data"][0]["sparse_embedding"]
    assert min(least["values"]) == few["values"][0]

    found = httpx.post(f"{server.url}/embed_sparse", json={"inputs": TEXTS[:2]}).json()
    first = response["data"][0]["sparse_embedding"]
    pairs = zip(first["indices"], first["values"], strict=True)
    assert found[0] == [{"index": index, "value": value} for index, value in pairs]
    for path, asked, status in (
        ("/v1/embeddings", {"input": "a", "outputs": ["tokens"]}, 400),
        ("/v1/embeddings", {"input": "a", "outputs": []}, 400),
        ("/v1/embeddings", {"input": "a", "top_k": 0}, 400),
        ("/v1/embeddings", {"input": "a", "min_weight": -1}, 400),
        ("/v1/embeddings", {"input": "a", "sparse_format": "other"}, 400),
        ("/v1/embeddings", {"input": "a", "normalized": False}, 200),  # for vectors alone
        ("/pooling", {"input": "a", "outputs": ["sparse"]}, 400),
        ("/embed", {"inputs": "a"}, 404),
        ("/embed_all", {"inputs": "a"}, 400),
        ("/v2/embed", {"texts": ["a"], "input_type": "search_query", "model": "outputs"}, 404),
        ("/v1/rerank", {"query": "a", "documents": ["a"]}, 404),
    ):
        assert httpx.post(f"{server.url}{path}", json=asked).status_code == status, path
    listed = server.get("/").json()["endpoints"]
    assert {"/v1/embeddings", "/embed_sparse"} <= set(listed)
    assert not set(listed) & {"/embed", "/v1/rerank"}


def test_token_api_and_ranking(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    folder = multi_vector(tmp_path / "multi", "bert", [","], {"query_expansion": EXPANSION})
    edit(folder / LIBRARY, {"similarity_fn_name": "meanmaxsim"})
    library = encoder("MultiVectorEncoder", folder)
    server = serve("--spec", str(spec(tmp_path, folder)), "--precision", "fp32", "--api-processes", "2")
    for role in ("query", "document"):
        entries = server.embed(input=TEXTS, input_type=role).json()["data"]
        for entry, expected in zip(entries, encode(library, role), strict=True):
            np.testing.assert_allclose(entry["token_embeddings"], np.asarray(expected), atol=1e-5)
    query, documents = "Which river flows?", TEXTS
    expected_scores = library.similarity(library.encode_query([query]), library.encode_document(documents))[0].numpy()
    body = {"query": query, "documents": documents}
    results = httpx.post(f"{server.url}/v1/rerank", json=body).json()["results"]
    assert [entry["index"] for entry in results] == np.argsort(-expected_scores, kind="stable").tolist()
    found = [entry["relevance_score"] for entry in results]
    np.testing.assert_allclose(found, np.sort(expected_scores)[::-1], rtol=1e-5)
    # The vectors of documents come from the cache.
    again = httpx.post(f"{server.url}/v1/rerank", json=body)
    assert int(again.headers["x-inferctl-cached-tokens"]) == int(again.headers["x-inferctl-tokens"])
    texts = {"query": query, "texts": documents}
    for path, sent in (("/rerank", texts), ("/v2/rerank", body), ("/voyage/rerank", body)):
        assert httpx.post(f"{server.url}{path}", json=sent).status_code == 200, path

    long = "x " * 500
    for field, pair in (("documents", {"query": "a", "documents": ["a", long]}), ("query", body | {"query": long})):
        error = httpx.post(f"{server.url}/v1/rerank", json=pair | {"truncate": False}).json()["error"]
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")

    entry = server.embed(input=TEXTS[0], output_dtype="ubinary", encoding_format="base64").json()["data"][0]
    whole = np.asarray(server.embed(input=TEXTS[0]).json()["data"][0]["token_embeddings"])
    import base64

    bits = np.array([np.frombuffer(base64.b64decode(row), np.uint8) for row in entry["token_embeddings"]])
    assert np.array_equal(bits, np.packbits(whole > 0, axis=1))
    assert server.embed(input="a new text", output_dtype="int8").status_code == 400
    assert "x-inferctl-cached-tokens" not in server.embed(input="a new text").headers  # nothing was computed

    pooled = httpx.post(f"{server.url}/pooling", json={"input": TEXTS, "task": "token_embed"}).json()["data"]
    assert [entry["data"] for entry in pooled] == [
        entry["token_embeddings"] for entry in server.embed(input=TEXTS).json()["data"]
    ]


def test_a_request_gets_the_outputs_that_it_names(converted_bge: Path, serve: Callable[..., ServerProcess]) -> None:
    server = serve("--model", str(converted_bge), "--precision", "fp32")
    names = {"dense": "embedding", "sparse": "sparse_embedding", "tokens": "token_embeddings"}
    every = server.embed(input=TEXTS, outputs=list(names)).json()["data"]
    assert set(every[0]) == {"object", "index", *names.values()}
    spaces = server.embed(input=TEXTS, outputs=list(names)).headers["x-inferctl-space"].split(", ")
    assert [each.split("_")[0] for each in spaces] == list(names)
    for name, field in names.items():
        alone = server.embed(input=TEXTS, outputs=[name]).json()["data"]
        assert set(alone[0]) == {"object", "index", field}
        assert [entry[field] for entry in alone] == [entry[field] for entry in every]
    assert server.embed(input=TEXTS).json()["data"] == server.embed(input=TEXTS, outputs=["dense"]).json()["data"]
    assert httpx.post(f"{server.url}/embed", json={"inputs": TEXTS}).json() == [entry["embedding"] for entry in every]
    sparse = httpx.post(f"{server.url}/embed_sparse", json={"inputs": TEXTS[0]}).json()
    assert [entry["index"] for entry in sparse[0]] == every[0]["sparse_embedding"]["indices"]


def test_tokens_of_responses_that_are_being_sent_are_bounded(minilm: Path) -> None:
    """Each token keeps about 120 bytes: one client with many connections let a server grow by 40 MiB/s."""
    config = task_config.read("embed", minilm)
    model = ServedModel("m", "m", (), None, 100, 100, truncate=True, max_held_numbers=3000)
    metrics = Metrics()
    batcher = Batcher(QueueLimits(8, 1_000), learned(0.0, 10.0))
    pool = TokenizerPool(minilm, config, threads=1)
    inference = Inference(model, pool, LocalBackend([Stack(Dispatcher(batcher, metrics))]))

    async def post(sent: asyncio.Event, go_on: asyncio.Event) -> None:
        body = json.dumps({"inputs": "a " * 60}).encode()
        scope: Any = {"headers": [], "state": {}}
        RequestContext.of(scope)

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        async def send(_: Any) -> None:
            sent.set()
            await go_on.wait()

        await tokenize(inference, scope, receive, send)

    async def run() -> None:
        sent, go_on = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(post(sent, go_on))
        await sent.wait()
        with pytest.raises(ApiError) as rejected:
            await asyncio.wait_for(post(asyncio.Event(), go_on), 10)
        assert rejected.value.status == 429
        go_on.set()
        await first
        await post(sent, go_on)

    asyncio.run(run())
    pool.close()


@pytest.mark.parametrize("products", [None, 1, 50])
def test_the_largest_similarities_are_added_in_parts(products: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if products is not None:
        monkeypatch.setattr(outputs_module, "_PART_PRODUCTS", products)
        monkeypatch.setattr(outputs_module, "_PART_NUMBERS", products)
    random = np.random.default_rng(0)
    query, *documents = (random.standard_normal((size, 3), np.float32) for size in (7, 0, 2, 9, 0, 1, 0))
    scores = np.zeros(len(documents), np.float32)
    parts = len(list(outputs_module.add_similarities(scores, query, documents)))
    expected = [(query @ each.T).max(axis=1).sum() if len(each) else 0 for each in documents]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert parts == 1 if products is None else parts > 2
    assert not list(outputs_module.add_similarities(scores, query, [documents[0]]))
    assert not list(outputs_module.add_similarities(scores, query[:0], documents))
