"""The chat template with which a reranker renders a query and a document into one text. Read without torch.

As in sentence-transformers, the texts of a pair are messages with the roles `query` and `document`. An instruction is a
message with the role `system` before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.reading.modules import read_object, transformer_settings
from inferctl.reading.tokenizer_files import token_text

FILE = "chat_template.jinja"
# Parts of a template that reads lists of parts instead of texts, if the folder does not say which of both it reads.
_READS_PARTS = ("content[0]", ".type", "'type'", '"type"', "message.content[")
# Of the settings for a template. The first ones are about tokens, not about the text.
_SIZES, _RESTORE = frozenset({"padding", "truncation", "max_length", "return_tensors"}), "restore_suffix"
_HINT = "use a model whose chat template renders messages with the roles `query` and `document`"


@dataclass(frozen=True)
class PairTemplate:
    """`source`: of Jinja. `structured`: whether the content of a message is a list of parts instead of a text.

    `variables`: what the template reads besides `messages`, such as `bos_token`.
    """

    source: str
    structured: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, query: str, document: str, instruction: str = "") -> list[dict[str, Any]]:
        """Return the messages of a pair."""
        texts = {"system": instruction, "query": query, "document": document}
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}
            for role, text in texts.items()
            if text or role != "system"
        ]

    def render(self, query: str, document: str, instruction: str = "") -> str:
        """Return the text of a pair."""
        return str(self._compiled.render(messages=self.messages(query, document, instruction), **self.variables))

    @cached_property
    def takes_instruction(self) -> bool:
        """Whether the text depends on the instruction."""
        return self.render("a", "b", "one") != self.render("a", "b", "two")

    def renamed(self, names: Mapping[str, str]) -> PairTemplate:
        """Return the template that writes other names of tokens."""

        def change(value: Any) -> Any:
            if isinstance(value, str):
                for name in sorted(names, key=len, reverse=True):
                    value = value.replace(name, names[name])
            return value

        variables = {key: change(value) for key, value in self.variables.items()}
        return replace(self, source=change(self.source), variables=variables)

    @cached_property
    def _compiled(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(  # as in transformers
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = fail
        return environment.from_string(self.source)


def read(folder: Path) -> PairTemplate | None:
    """Return the template with which sentence-transformers renders pairs for a model folder; None if it renders none.

    Raises `UsageError` for a template that does not render both texts of a pair, and for settings without support.
    """
    own = read_object(folder / "tokenizer_config.json")
    source = _source(folder, own)
    settings = transformer_settings(folder)
    modalities = settings.get("modality_config")
    if source is None or (modalities is None and settings) or "message" not in (modalities or {"message": {}}):
        return None
    form = ((modalities or {}).get("message") or {}).get("format")
    structured = any(part in source for part in _READS_PARTS) if form in (None, "auto") else form == "structured"
    given = dict((settings.get("processing_kwargs") or {}).get("chat_template") or {})
    if unsupported := [key for key in given if key in _SIZES or (key == _RESTORE and not given[key])]:
        raise UsageError(f"{folder} sets {unsupported[0]} for its chat template, which is not supported", _HINT)
    given.pop(_RESTORE, None)
    tokens = {name: text for name, value in own.items() if name.endswith("_token") and (text := token_text(value))}
    found = PairTemplate(source, structured, {"add_generation_prompt": False, **tokens, **given})
    _check(folder, found)
    return found


def _check(folder: Path, template: PairTemplate) -> None:
    try:
        base, other_query, other_document = (
            template.render(*pair) for pair in (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))
        )
    except Exception as error:  # noqa: BLE001  # a template can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"the chat template of {folder} cannot render a query and a document: {reason}", _HINT
        ) from None
    if base in (other_query, other_document):
        missing = "query" if base == other_query else "document"
        raise UsageError(f"the chat template of {folder} does not render the {missing}: it is not for pairs", _HINT)


def _source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the template of a folder, from the places and in the order of transformers."""
    if (file := folder / FILE).is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # of several, by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None
