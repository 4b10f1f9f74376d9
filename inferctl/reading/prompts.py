"""The prompts of a model: texts that precede the inputs, selected by the rules of sentence-transformers.

sentence-transformers 6.2 gives every model an empty `query` and an empty `document`. Here, a name is one in the model's
files: a request with another `prompt_name` expects a prompt that no model has, so it is rejected. An `input_type` says
only what the inputs are, and clients of Cohere always send one. So a model without a prompt for queries or documents
embeds them without one. The empty `document` of the library also hides `passage` and `corpus`, which its documentation
names next. Here, they precede documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from inferctl.core.errors import UsageError, shown

# The words of Cohere, Voyage and Jina that do not depend on the model, and the first of these prompts that it has.
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
_WORDS = {"query": _QUERY, "search_query": _QUERY, "document": _DOCUMENT, "search_document": _DOCUMENT}
_WORDS |= {"retrieval.query": _QUERY, "retrieval.passage": _DOCUMENT}
# Words for which a model with prompts needs one of that name: without it, its vectors would be those of another use.
_USES = ("classification", "clustering", "text-matching", "separation")


@dataclass(frozen=True)
class Prompts:
    """`texts`: by name, as in `config_sentence_transformers.json`. `default`: the name of the one without a choice.

    `pooled`: whether the pooling includes the tokens of a prompt. If not, only empty prompts are supported.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    pooled: bool = True

    @property
    def names(self) -> list[str]:
        """The names that a request can select."""
        return [name for name, text in self.texts.items() if self.pooled or not text]

    @cached_property
    def default_text(self) -> str:
        """The prompt of requests that select none."""
        return self.texts[self.default] if self.default else ""

    @cached_property
    def unused(self) -> bool:
        """Whether the model has prompts, and requests that select none have none of them."""
        return self.pooled and any(self.texts.values()) and not self.default_text

    @property
    def summary(self) -> str:
        """Which prompts requests can select, and which one the others have. Empty if all of them are empty."""
        if not any(self.texts[name] for name in self.names):
            return ""
        without = f"have `{self.default}`" if self.default_text else "have none"
        return f"{', '.join(self.names)}: requests without `prompt_name` and `input_type` {without}"

    @property
    def input_types(self) -> list[str]:
        """The words that `select` accepts as `input_type`."""
        words = [word for word, prompts in _WORDS.items() if self.pooled or not self._first(prompts)]
        return list(dict.fromkeys([*self.names, *words, *(() if any(self.texts.values()) else _USES)]))

    def select(self, prompt: str | None = None, name: str | None = None, input_type: str | None = None) -> str:
        """Return the prompt of a request: `prompt`, else the one called `name`, else that of `input_type`.

        An `input_type` is the name of a prompt, or a word of Cohere, Voyage and Jina. Raises `UsageError` for an
        unknown name, and for a prompt that the pooling excludes.
        """
        wanted = input_type if name is None else name
        if prompt is not None:
            text = prompt
        elif wanted is None:
            text = self.default_text
        elif wanted in self.texts:
            text = self.texts[wanted]
        elif name is None and wanted in (*_WORDS, *self.input_types):
            text = self._first(_WORDS.get(wanted, ()))
        else:
            known = ", ".join(self.input_types if name is None else self.names)
            hint = f"use one of these: {known}" if known else "it has none: remove `prompt_name`"
            raise UsageError(f"the model has no prompt {shown(wanted)}", hint)
        if text and not self.pooled:
            message = "the pooling of the model excludes the tokens of a prompt, which is not supported"
            raise UsageError(message, "use a model with `include_prompt: true`, or no prompt")
        return text

    def role(self, name: str | None = None, input_type: str | None = None) -> Literal["query", "document"] | None:
        """Return what the inputs of a request are, by its `prompt_name`, else its `input_type`; None if it is open."""
        words = _WORDS.get((input_type if name is None else name) or "")
        return None if words is None else "query" if words is _QUERY else "document"

    def misses_query(self, input_type: str | None) -> bool:
        """Whether inputs are said to be queries, and no prompt is called so: those of the model have other names."""
        return input_type is not None and _WORDS.get(input_type) is _QUERY and _QUERY[0] not in self.texts

    def _first(self, names: Sequence[str]) -> str:
        return next((self.texts[name] for name in names if name in self.texts), "")


NO_PROMPTS = Prompts()


def read(settings: Mapping[str, Any], *, pooled: bool = True) -> Prompts:
    """Return the prompts in the content of `config_sentence_transformers.json`.

    Raises `UsageError` if it is invalid, or if `pooled` is false and there is a default prompt.
    """
    texts, default = settings.get("prompts") or {}, settings.get("default_prompt_name") or None
    if not isinstance(texts, dict) or not all(isinstance(text, str | None) for text in texts.values()):
        raise _invalid("`prompts` is not an object of texts")
    if default is not None and default not in (*texts, "query", "document"):
        raise _invalid(f"`default_prompt_name` is {default!r}, which is not in `prompts`")
    texts = {name: text or "" for name, text in texts.items()}
    found = Prompts(texts, default if default in texts else None, pooled)
    if found.default_text and not pooled:
        raise UsageError(
            f"the pooling of the model excludes the tokens of its default prompt {default!r}, which is not supported",
            "use a model with `include_prompt: true`, or without a default prompt",
        )
    return found


def _invalid(problem: str) -> UsageError:
    return UsageError(f"config_sentence_transformers.json: {problem}", "download the model again, or correct the file")
