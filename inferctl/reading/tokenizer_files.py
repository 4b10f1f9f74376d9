"""What the files of a tokenizer say next to `tokenizer.json`, which is all that the server runs, and its last token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.normalizers import Normalizer

from inferctl.core.errors import UsageError
from inferctl.reading.modules import PoolingMode, read_object

# The code of these tokenizers does what `add_eos_token` says, which the server does too.
_KNOWN_CODE = frozenset({"tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"})


def token_text(value: Any) -> str | None:
    """Return the text of a special token, which a file of transformers has as a text or as an object."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def refuse_code(folder: Path) -> None:
    """Raise `UsageError` if the tokenizer of a folder is code of its own."""
    code = (read_object(folder / "tokenizer_config.json").get("auto_map") or {}).get("AutoTokenizer") or []
    if others := [name for name in ([code] if isinstance(code, str) else code) if name and name not in _KNOWN_CODE]:
        raise UsageError(
            f"the tokenizer of {folder} has code of its own ({others[0]}), which is not run",
            "if tokenizer.json does the same, remove `auto_map` from tokenizer_config.json",
        )


def refuse_unsteady(folder: Path, tokenizer: Tokenizer, *, static: bool, rendered: bool) -> None:
    """Raise `UsageError` for a tokenizer that drops merges at random, or truncates the start of a text.

    `static`: sentence-transformers runs tokenizer.json alone. `rendered`: pairs are truncated in their own way.
    """
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise UsageError(
            f"the tokenizer of {folder} has `dropout: {dropout:g}`: it makes other tokens of a text each time",
            'set "dropout" of "model" in tokenizer.json to null',
        )
    side = None if static else read_object(folder / "tokenizer_config.json").get("truncation_side")
    found = side or (tokenizer.truncation or {}).get("direction", "right")
    if found.lower() == "left" and not rendered:
        raise UsageError(
            f"the tokenizer of {folder} truncates at the start of a text, which is not supported",
            'if texts are not truncated, set `truncation_side` in tokenizer_config.json, and "direction" of '
            '"truncation" in tokenizer.json, to "right"',
        )


def eos(tokenizer: Tokenizer) -> str | None:
    """Return the special token that the tokenizer itself adds after a text, else None."""
    encoding = tokenizer.encode("a")
    return encoding.tokens[-1] if encoding.special_tokens_mask[-1:] == [1] else None


def missing_eos(folder: Path, tokenizer: Tokenizer, pooling: Sequence[PoolingMode]) -> int | None:
    """Return the id of the token that `add_eos_token` asks for after each text and the tokenizer does not add.

    It matters to a model that pools the last token. transformers 4 added it to some tokenizers, transformers 5 adds it
    to none with a `tokenizer.json`. Raises `UsageError` if the tokenizer does not know the token.
    """
    settings = read_object(folder / "tokenizer_config.json")
    if "last" not in pooling or settings.get("add_eos_token") is not True:
        return None
    wanted = token_text(settings.get("eos_token")) or ""
    if wanted == eos(tokenizer):
        return None
    found: int | None = tokenizer.token_to_id(wanted)
    if found is None:
        raise UsageError(
            f"tokenizer_config.json of {folder} asks for a token after each text (add_eos_token), but tokenizer.json "
            f"has no token {wanted!r}",
            "set `eos_token` to that of the model, or `add_eos_token: false`",
        )
    return found


def with_lower_case(normalizer: Normalizer | None) -> Normalizer:
    """Return what `do_lower_case` of sentence-transformers makes of the normalizer of a tokenizer.

    Lower case comes first, unless one of its own steps is Lowercase. Special tokens in a text remain as they are.
    """
    steps: list[Normalizer] = [normalizer] if normalizer else []
    if isinstance(normalizer, normalizers.Sequence):
        steps = [normalizer[index] for index in range(len(normalizer))]
    has_lowercase = any(isinstance(step, normalizers.Lowercase) for step in steps)
    return normalizers.Sequence(steps if has_lowercase else [normalizers.Lowercase(), *steps])


def lowers_case(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer itself turns text into lower case."""
    return tokenizer.normalizer is not None and "a" in tokenizer.normalizer.normalize_str("A")
