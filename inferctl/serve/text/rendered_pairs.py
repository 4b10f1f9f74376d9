"""The token ids of pairs that the chat template of a reranker renders as one text each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from inferctl.reading.rows import Tokens
from inferctl.serve.text.private_tokens import PrivateTokens
from inferctl.serve.text.text_parts import (
    CHARACTERS_PER_TOKEN,
    MAX_HEAD,
    MIN_HEAD,
    InputError,
    Pair,
    common_end,
    head_of,
    listed,
    not_empty,
    require_truncation,
)
from inferctl.serve.text.word_piece import TokenizedText, guarded

# Tokens that a template and a query must leave for a document: those of the texts that `encode` cuts with.
TEMPLATE_ROOM = 8


@dataclass(frozen=True)
class RenderedPairs:
    """`max_tokens`: of a pair. Of the pool: `encodings(texts, field, first=...)`, which adds no special tokens, and
    `untruncated`, which gives the tokenizer of the thread.
    """

    private: PrivateTokens
    max_tokens: int
    encodings: Callable[..., Iterator[TokenizedText]]
    untruncated: Callable[[], AbstractContextManager[Tokenizer]]

    def encode(
        self,
        query: str | Sequence[str],
        documents: Sequence[str],
        instruction: str,
        *,
        truncate: bool,
        first: int,
        most: int | None,
    ) -> tuple[list[Pair], int]:
        """Return the pairs, and how many are truncated: of a long one, the end of its document is cut.

        As in sentence-transformers, what follows the document is tokenized on its own if it is cut.
        """
        render = self.private.template.render
        if most is not None and most < self.max_tokens:  # else the pair is truncated before
            documents = [self.first_tokens(text, most) for text in documents]
        # First without documents, because each text repeats the query.
        without = [render(text, "", instruction) for text in listed(query)]
        for index, (_, size) in enumerate(self.encodings(without, "query", first=first), first):
            if size + TEMPLATE_ROOM > self.max_tokens:
                message = f"leaves no room for a document: the model accepts {self.max_tokens} tokens of both"
                only_query = isinstance(query, str)
                raise InputError(None if only_query else index, "context_length_exceeded", message, "query")
        queries = [query] * len(documents) if isinstance(query, str) else query
        texts = [render(text, document, instruction) for text, document in zip(queries, documents, strict=True)]
        pairs, truncated = [], 0
        ends: dict[str, Tokens] = {}
        found = self.encodings(texts, "documents", first=first)
        for index, (text, (ids, size)) in enumerate(zip(queries, found, strict=True), first):
            if size > len(ids):
                require_truncation(index, truncate, self.max_tokens, "documents")
                truncated += 1
                if text not in ends:
                    short = [render(text, document, instruction) for document in ("0", "1 2 3 4")]
                    ends[text] = common_end(*(row.ids for row in self.encodings(short, "query", first=index)))
                ids = np.concatenate((ids[: len(ids) - len(ends[text])], ends[text]))
            pairs.append((self.private.public(not_empty(ids, index, "documents")), len(ids)))
        return pairs, truncated

    def first_tokens(self, text: str, count: int) -> str:
        """Return a text up to the end of its first `count` tokens."""
        size = max(MIN_HEAD, CHARACTERS_PER_TOKEN * count)
        with self.untruncated() as tokenizer:
            while True:
                head = head_of(text, size)
                (found,) = guarded(partial(tokenizer.encode_batch, [head], add_special_tokens=False))
                if len(found) > count:
                    return text[: found.offsets[count - 1][1]]
                if len(head) == len(text) or size >= MAX_HEAD:
                    return head
                size = min(4 * size, MAX_HEAD)
