"""The request and response schemas of `POST /v1/rerank` and `POST /v1/score`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StrictBool,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from inferctl.serve.api.schemas import Count, ModelRequest, Text, Usage, limit_items

_TRUNCATE = Field(
    None, description="Truncate long pairs (true) or respond with 400 (false). Default: the server's setting."
)

_INSTRUCTION = Field(
    None, description="What makes a document relevant, for a language model that reads it. Default: that of the model."
)


class Document(BaseModel):
    """A document to rank. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    text: StrictStr


_Documents = Annotated[list[StrictStr | Document], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]


class RerankRequest(ModelRequest):
    """The body of `POST /v1/rerank`."""

    query: Text = Field(description="The text that the documents are compared with.")
    documents: _Documents = Field(description="The documents: texts, or objects with a `text`.")
    top_n: Count | None = Field(None, description="Return only this many results. Default: all.")
    return_documents: StrictBool | None = Field(None, description="Return the text of each document too.")
    truncate: StrictBool | None = _TRUNCATE
    max_tokens_per_doc: Count | None = Field(
        None, description="Truncate each document to this many tokens, before pairs are truncated to the model's limit."
    )
    instruction: Text | None = _INSTRUCTION

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class VoyageRerankRequest(ModelRequest):
    """The body of `POST /voyage/rerank`."""

    query: Text = Field(description="The text that the documents are compared with.")
    documents: _Documents = Field(description="The documents.")
    top_k: Count | None = Field(None, description="Return only this many results. Default: all.")
    return_documents: StrictBool | None = Field(None, description="Return the text of each document too.")
    truncation: StrictBool | None = _TRUNCATE

    @property
    def rerank(self) -> RerankRequest:
        """The request in the shape of `POST /v1/rerank`."""
        return RerankRequest.model_construct(
            query=self.query,
            documents=self.documents,
            top_n=self.top_k,
            return_documents=self.return_documents,
            truncate=self.truncation,
            instruction=None,
        )


_Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]


_MaybeEmptyTexts = Annotated[list[StrictStr], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]


class TeiRerankRequest(ModelRequest):
    """The body of `POST /rerank` in the shape of text-embeddings-inference, which has `texts`."""

    query: Text = Field(description="The text that the others are compared with.")
    texts: _MaybeEmptyTexts = Field(description="The texts to rank.")
    raw_scores: StrictBool = Field(False, description="True: return the logits of the model.")
    return_text: StrictBool = Field(False, description="Return each text too.")
    truncate: StrictBool | None = _TRUNCATE
    truncation_direction: Literal["Right", "right"] | None = Field(None, description="Long pairs lose their end.")


class ScoreRequest(ModelRequest):
    """The body of `POST /v1/score`: one text with several, or two lists of the same length."""

    text_1: Text | _Texts = Field(description="A text, or a list of texts.")
    text_2: Text | _MaybeEmptyTexts = Field(description="A text, or a list of as many texts as `text_1` has.")
    truncate: StrictBool | None = _TRUNCATE
    instruction: Text | None = _INSTRUCTION

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        first, second = _listed(self.text_1), _listed(self.text_2)
        if len(first) != len(second) and len(first) > 1:
            detail = {"first": len(first), "second": len(second)}
            message = "text_1 has {first} texts and text_2 has {second}; text_1 must have 1, or as many as text_2"
            raise PydanticCustomError("unequal_lengths", message, detail)
        return self

    @property
    def pairs(self) -> tuple[str | list[str], list[str]]:
        """One first text for all second texts, or one for each; and the second texts."""
        first, second = _listed(self.text_1), _listed(self.text_2)
        return (first[0] if len(first) == 1 else first), second


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class RerankResult(BaseModel):
    """One document, by its index in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """The successful response of `POST /v1/rerank`: the results with the highest scores first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage


class TeiRank(BaseModel):
    """One text, by its index in the request."""

    index: int
    score: float
    text: str | None = None


class TeiRerankResponse(RootModel[list[TeiRank]]):
    """The successful response of `POST /rerank` with `texts`: the highest scores first."""


class VoyageRerankResult(BaseModel):
    """One document, by its index in the request."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageRerankResponse(BaseModel):
    """The successful response of `POST /voyage/rerank`: the results with the highest scores first."""

    object: Literal["list"] = "list"
    data: list[VoyageRerankResult]
    model: str
    usage: Usage


class Score(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    """The successful response of `POST /v1/score`."""

    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    usage: Usage
