"""A tokenizer whose control tokens have names that no text of a user has.

A chat template writes control tokens such as `<|im_end|>` into the same text as what users send. Here, the template
writes private names instead, so the same token in a user's text is text. The text is tokenized as a whole, because
tokens can join at the borders of its parts.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from inferctl.reading.pair_template import PairTemplate
from inferctl.reading.rows import Tokens


class PrivateTokens:
    """`template` writes the private names, and `content` is a `tokenizer.json` that knows them, without special tokens.

    Control tokens are those that are marked as special, those such as `<|fim_middle|>`, and those in angle or square
    brackets that the template writes, such as `<think>`. Others, such as the line breaks and HTML tags of Gemma, stand
    for text.
    """

    def __init__(self, file: Path, template: PairTemplate) -> None:
        document = json.loads(file.read_text(encoding="utf-8"))
        written = template.source + "".join(value for value in template.variables.values() if isinstance(value, str))
        secret = secrets.token_hex(8)
        self._ids: dict[str, int] = {}
        self.names: dict[str, str] = {}
        for number, token in enumerate(document.get("added_tokens") or []):
            name = token["content"]
            if (
                token.get("special")
                or re.fullmatch(r"<\|.+\|>", name)
                or (name in written and re.fullmatch(r"<.+>|\[.+\]", name))
            ):
                self.names[name] = token["content"] = f"<|{secret}{number:06}|>"
            self._ids[token["content"]] = token["id"]
        document["post_processor"] = None
        self._rename(document["model"])
        self.content, self.template = json.dumps(document), template.renamed(self.names)
        self._public: Tokens | None = None

    def _rename(self, model: dict[str, Any]) -> None:
        """Rename the control tokens among the tokens that texts are made of, where some tokenizers have them too."""
        names, vocabulary = self.names, model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
        else:  # Unigram
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if (unknown := model.get("unk_token")) in names:
            model["unk_token"] = names[unknown]
        if merges := model.get("merges"):
            pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
            model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Find out which ids `tokenizer`, made of `content`, gives to the added tokens."""
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())  # there can be gaps before it
        public = np.arange(largest + 1, dtype=np.int32)
        for name, id in self._ids.items():
            public[tokenizer.token_to_id(name)] = id
        self._public = public

    def public(self, ids: Tokens) -> Tokens:
        """Return the ids that the model knows."""
        assert self._public is not None, "`prepare` comes first"
        return self._public[ids]

    def is_in(self, text: str) -> bool:
        """Whether a text contains the name of a control token."""
        return any(name in text for names in self.names.items() for name in names)
