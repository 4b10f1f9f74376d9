"""Cohere's API for embeddings: `POST /v2/embed`, and `POST /v1/embed` of its first version.

Sources: https://docs.cohere.com/reference/embed, https://docs.cohere.com/v1/reference/embed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, Field, StrictStr

from inferctl.models.vector_format import VectorFormat
from inferctl.reading.rows import Vectors
from inferctl.serve.api.embedding_outputs import json_rows
from inferctl.serve.api.embeddings import EmbeddingRequest, embed
from inferctl.serve.api.endpoint import COHERE, TEXTS
from inferctl.serve.api.schemas import Count, ModelRequest, Text, Unsupported, json_list, limit_items, parts
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.request_context import RequestContext

EmbeddingType = Literal["float", "binary", "ubinary", "base64"]


class CohereEmbedRequest(ModelRequest):
    """The body of `POST /v2/embed`. Images and mixed inputs are not supported."""

    unsupported: ClassVar[Unsupported] = {"images": (), "inputs": (), "max_tokens": ()}
    texts: Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)] = Field(
        description="The texts."
    )
    input_type: StrictStr | None = Field(
        None, description="What the texts are: `search_query`, `search_document`, `classification`, `clustering`."
    )
    embedding_types: Annotated[list[EmbeddingType], Field(min_length=1, max_length=4)] | None = Field(
        None, description="The numbers of the vectors, one or several."
    )
    output_dimension: Count | None = Field(
        None, description="Truncate the vectors to this many dimensions; only for models that are trained for it."
    )
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None,
        description="`START`, `END`: what long texts lose. `NONE`: 400. Default: the server's setting.",
    )


# A field that is called `float` would hide the type.
_Floats = list[list[float]]
_Integers = list[list[int]]


class ByType(BaseModel):
    """The vectors of all texts, for each type of the request."""

    float: _Floats | None = None
    binary: _Integers | None = None
    ubinary: _Integers | None = None
    base64: list[str] | None = None


class CohereEmbedResponse(BaseModel):
    """The successful response. `embeddings` is a list for a request to `/v1/embed` without `embedding_types`."""

    id: str
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    embeddings: ByType | _Floats
    texts: list[str]
    meta: dict[str, object]


@dataclass(frozen=True)
class CohereEmbed:
    """It is an `EmbeddingApi`. `version`: of Cohere's API."""

    version: Literal[1, 2]
    names: ClassVar[Mapping[str, str]] = {
        "input": "texts",
        "dimensions": "output_dimension",
        "output_dtype": "embedding_types",
    }
    request: ClassVar[type[ModelRequest]] = CohereEmbedRequest

    def embedding(self, request: CohereEmbedRequest, model: ServedModel) -> EmbeddingRequest:
        """Return the request in OpenAI's shape. Part of `EmbeddingApi`."""
        return EmbeddingRequest.model_construct(
            outputs=["dense"],
            input=request.texts,
            dimensions=request.output_dimension,
            input_type=request.input_type,
            truncate=None if request.truncate is None else request.truncate != "NONE",
            truncation_side="left" if request.truncate == "START" else None,
        )

    def response(
        self, request: CohereEmbedRequest, vectors: Vectors, model: ServedModel, context: RequestContext
    ) -> Iterator[bytes]:
        """Return the JSON of a response. Part of `EmbeddingApi`."""
        plain = self.version == 1 and request.embedding_types is None
        kind = "embeddings_floats" if plain else "embeddings_by_type"
        yield orjson.dumps({"id": context.asked.id.decode(), "response_type": kind})[:-1] + b',"embeddings":'
        for number, name in enumerate(dict.fromkeys(request.embedding_types or ("float",))):
            head = b"[" if plain else b'%s"%s":[' % (b"," if number else b"{", name.encode())
            wanted: VectorFormat = "float" if name == "base64" else name
            yield from json_list(head, (json_rows(vectors[part], name, wanted) for part in parts(vectors)))
        billed = {"billed_units": {"input_tokens": context.input_tokens}, "api_version": {"version": str(self.version)}}
        yield (b"," if plain else b"},") + orjson.dumps({"texts": request.texts, "meta": billed})[1:]


_VERSIONS: tuple[Literal[1, 2], ...] = (2, 1)
ENDPOINTS = tuple(
    embed(
        f"/v{version}/embed",
        f"Compute embeddings in one or several number formats, as version {version} of Cohere's API.",
        CohereEmbedResponse,
        CohereEmbed(version),
        example={"texts": TEXTS, "embedding_types": ["float"]},
        errors=COHERE,
        output="dense",
    )
    for version in _VERSIONS
)
