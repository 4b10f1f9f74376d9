"""Count the tokens of words and prompts, with the tokenizer of a model folder or of a running server."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Counts tokens, without those that mark the ends of a text."""

    def of_texts(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text."""
        ...

    def of_words(self, words: Sequence[str]) -> list[int]:
        """Return the tokens of each word after a space, within a text. They may be those of a typical text."""
        ...


class FileTokenizer:
    """The tokenizer in a tokenizer.json."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        self._loaded = Loaded.from_file(str(file))
        self._loaded.no_truncation()
        self._loaded.no_padding()

    def of_texts(self, texts: Sequence[str]) -> list[int]:
        return [len(found.ids) for found in self._loaded.encode_batch(list(texts), add_special_tokens=False)]

    def of_words(self, words: Sequence[str]) -> list[int]:
        # Tokenizers differ in what they do with a space at the start of a text.
        alone, *counts = self.of_texts(["a", *(f"a {word}" for word in words)])
        return [count - alone for count in counts]


def of_model(folder: Path | None) -> FileTokenizer | None:
    """Return the tokenizer of a model folder; None if it has no tokenizer.json, or none can be read here."""
    file = folder and folder / "tokenizer.json"
    return FileTokenizer(file) if file and file.is_file() and find_spec("tokenizers") else None
