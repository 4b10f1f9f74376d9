"""The API of text-embeddings-inference for embeddings: `POST /embed` and `POST /similarity`.

The names are those of `router/src/http/types.rs` of its version 1.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, RootModel, StrictBool, StrictStr

from inferctl.reading.outputs import Output
from inferctl.reading.rows import Vectors
from inferctl.serve.api.embedding_outputs import SeveralOutputs, token_vectors
from inferctl.serve.api.embeddings import EmbeddingApi, EmbeddingRequest, Input, InputSchema, embed, validate_input
from inferctl.serve.api.endpoint import TEI, TEXTS, Endpoint
from inferctl.serve.api.schemas import Count, ModelRequest, Text, json_list, limit_items, parts
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.request_context import RequestContext


class TextOptions(BaseModel):
    """How texts become token ids."""

    truncate: StrictBool | None = Field(
        None, description="Truncate long inputs (true) or respond with 400 (false). Default: the server's setting."
    )
    truncation_direction: Literal["Right", "right", "Left", "left"] | None = Field(
        None, description="Long inputs lose their end (`Right`, the default) or their start (`Left`)."
    )
    prompt_name: StrictStr | None = Field(None, description="The name of a prompt of the model, as in `GET /info`.")


class TeiOptions(ModelRequest, TextOptions):
    """The body of `POST /embed_sparse` and `POST /embed_all`."""

    inputs: Annotated[Input, PlainValidator(validate_input, json_schema_input_type=InputSchema)] = Field(
        description="A text, a list of texts, one list of token ids, or a list of such lists."
    )


class EmbedRequest(TeiOptions):
    """The body of `POST /embed`."""

    normalize: StrictBool = Field(True, description="False: vectors of the length that the model gives them.")
    dimensions: Count | None = Field(
        None, description="Truncate the vectors to this many dimensions; only for models that are trained for it."
    )


class EmbedResponse(RootModel[list[list[float]]]):
    """The successful response of `POST /embed`: one vector per input, in order."""


class SparseValue(BaseModel):
    """The weight of a token of the vocabulary."""

    index: int
    value: float


class EmbedSparseResponse(RootModel[list[list[SparseValue]]]):
    """The successful response of `POST /embed_sparse`: the weights of each input, in order."""


class EmbedAllResponse(RootModel[list[list[list[float]]]]):
    """The successful response of `POST /embed_all`: the vectors of the tokens of each input, in order."""


class Sentences(BaseModel):
    """A text, and those that it is compared with."""

    source_sentence: Text
    sentences: Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]


class SimilarityRequest(ModelRequest):
    """The body of `POST /similarity`."""

    inputs: Sentences
    parameters: TextOptions | None = None


class SimilarityResponse(RootModel[list[float]]):
    """The successful response of `POST /similarity`: the cosine of the first text and each other one."""


class TeiEmbed:
    """It is an `EmbeddingApi`."""

    names: ClassVar[Mapping[str, str]] = {"input": "inputs", "normalized": "normalize"}
    request: ClassVar[type[ModelRequest]] = EmbedRequest

    def embedding(self, request: EmbedRequest, model: ServedModel) -> EmbeddingRequest:
        """Return the request in OpenAI's shape. Part of `EmbeddingApi`."""
        return _embedding(request, request.inputs, dimensions=request.dimensions, normalized=request.normalize)

    def response(
        self, request: EmbedRequest, vectors: Vectors, model: ServedModel, _: RequestContext
    ) -> Iterator[bytes]:
        """Return the JSON of a response. Part of `EmbeddingApi`."""
        return json_list(b"[", (np.ascontiguousarray(vectors[part]) for part in parts(vectors)))


@dataclass(frozen=True)
class TeiOutput:
    """It is an `EmbeddingApi`. `output`: `sparse` or `tokens`, which its responses have."""

    output: Output
    names: ClassVar[Mapping[str, str]] = {"input": "inputs"}
    request: ClassVar[type[ModelRequest]] = TeiOptions

    def embedding(self, request: TeiOptions, _: ServedModel) -> EmbeddingRequest:
        """Return the request in OpenAI's shape. Part of `EmbeddingApi`."""
        return _embedding(request, request.inputs, output=self.output)

    def response(self, _: Any, found: SeveralOutputs, *__: Any) -> Iterator[bytes]:
        """Return the JSON of a response. Part of `EmbeddingApi`."""
        separator = b"["
        for outputs in found.rows:
            yield separator
            if self.output == "tokens":
                yield from token_vectors(outputs.tokens)
            else:
                pairs = zip(outputs.ids.tolist(), outputs.weights, strict=True)
                entries = [{"index": number, "value": weight} for number, weight in pairs]
                yield orjson.dumps(entries, option=orjson.OPT_SERIALIZE_NUMPY)
            separator = b","
        yield b"]"


class TeiSimilarity:
    """It is an `EmbeddingApi`."""

    names: ClassVar[Mapping[str, str]] = {"input": "inputs"}
    request: ClassVar[type[ModelRequest]] = SimilarityRequest

    def embedding(self, request: SimilarityRequest, _: ServedModel) -> EmbeddingRequest:
        """Return the request in OpenAI's shape. Part of `EmbeddingApi`."""
        texts = [request.inputs.source_sentence, *request.inputs.sentences]
        return _embedding(request.parameters or TextOptions.model_construct(), texts)

    def response(self, _: Any, vectors: Vectors, model: ServedModel, context: RequestContext) -> Iterator[bytes]:
        """Return the JSON of a response. Part of `EmbeddingApi`."""
        first, others = vectors[0], vectors[1:]
        # Not `@`, for which BLAS would take all cores, which are those of the engine.
        return json_list(b"[", (np.einsum("ij,j->i", others[part], first) for part in parts(others)))


def _embedding(
    options: TextOptions,
    inputs: Input,
    *,
    dimensions: int | None = None,
    normalized: bool = True,
    output: Output = "dense",
) -> EmbeddingRequest:
    return EmbeddingRequest.model_construct(
        outputs=[output],
        input=inputs,
        truncate=options.truncate,
        truncation_side="left" if options.truncation_direction in ("Left", "left") else None,
        prompt_name=options.prompt_name,
        dimensions=dimensions,
        normalized=normalized,
    )


def _endpoint(path: str, what: str, response: type[BaseModel], api: EmbeddingApi, **others: Any) -> Endpoint:
    summary = f"Compute {what}, as text-embeddings-inference does."
    return embed(path, summary, response, api, **{"example": {"inputs": TEXTS}} | others, errors=TEI)


ENDPOINTS = (
    _endpoint("/embed", "the embeddings of texts", EmbedResponse, TeiEmbed(), aliases=("/",), output="dense"),
    _endpoint(
        "/embed_sparse", "the sparse weights of texts", EmbedSparseResponse, TeiOutput("sparse"), output="sparse"
    ),
    _endpoint("/embed_all", "one vector for each token of texts", EmbedAllResponse, TeiOutput("tokens")),
    _endpoint(
        "/similarity",
        "the cosines of a text and others",
        SimilarityResponse,
        TeiSimilarity(),
        example={"inputs": {"source_sentence": "a text", "sentences": TEXTS}},
        output="dense",
    ),
)
