"""The tokenizer of a running generation server: `POST /tokenize` of vLLM, SGLang and llama.cpp's server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from inferctl.bench.load.target import ServerConnection
from inferctl.core.errors import InferctlError

# Words of one request, and the tokens per word and line that fit into the context in any case.
_WORDS, _TOKENS_PER_LINE = 400, 8
_TIMEOUT_S = 10.0


class ServerTokenizer:
    """Counts tokens with requests to `server`. Words are counted many at a time, one per line."""

    def __init__(self, server: ServerConnection, newline: int) -> None:
        self._server, self._newline = server, newline
        self._words: dict[str, int] = {}
        context = (server.info.get("limits") or {}).get("max_context_tokens") or _WORDS * _TOKENS_PER_LINE
        self._batch = max(1, min(_WORDS, context // _TOKENS_PER_LINE))

    def of_texts(self, texts: Sequence[str]) -> list[int]:
        return [len(self._server.tokenize(text, _TIMEOUT_S)) for text in texts]

    def of_words(self, words: Sequence[str]) -> list[int]:
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        for start in range(0, len(new), self._batch):
            batch = new[start : start + self._batch]
            ids = self._server.tokenize("\n".join(["a", *(f" {word}" for word in batch)]), _TIMEOUT_S)
            lines = [len(list(line)) for is_end, line in itertools.groupby(ids, self._newline.__eq__) if not is_end]
            if len(lines) != len(batch) + 1:
                raise InferctlError("the tokens of a text cannot be divided into lines")
            self._words.update(zip(batch, lines[1:], strict=True))
        return [self._words[word] for word in words]


def of_server(server: ServerConnection) -> ServerTokenizer | None:
    """Return the tokenizer of a server; None if it has no `/tokenize`, or no token of its own for the end of a line."""
    try:
        lines = server.tokenize("a\n the\n the\n the", _TIMEOUT_S)
    except InferctlError:
        return None
    # The token that is there three times, but not at the end, ends a line.
    ends = [token for token in dict.fromkeys(lines) if lines.count(token) == 3 and token != lines[-1]]
    # A word of several tokens has more than one candidate.
    return ServerTokenizer(server, ends[0]) if ends else None
