"""Whether the files of a tokenizer agree, and which special tokens they add.

The server runs `tokenizer.json`. transformers builds some tokenizers from their class and `tokenizer_config.json`
instead, so a model was trained and is used elsewhere with what that file says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from inferctl.core.errors import UsageError
from inferctl.serve.modules import PoolingMode, read_object

# Classes that transformers builds with the normalizer and the special tokens of `tokenizer_config.json`. Without a
# class, it is that of the model's type.
_BERT_CLASSES = frozenset(
    f"{kind}Tokenizer{suffix}" for kind in ("Bert", "DistilBert", "Electra") for suffix in ("", "Fast")
)
_BERT_TYPES = frozenset({"bert", "distilbert", "electra"})
_XLM_CLASSES = frozenset({"XLMRobertaTokenizer", "XLMRobertaTokenizerFast"})
# The code of these tokenizers does what `add_eos_token` says, which the server does too.
_KNOWN_CODE = frozenset({"tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"})
# Upper case, an accent and Chinese: all that the normalizer of BERT treats in two ways.
_PROBE = "Aé机b"
_HINT = "write tokenizer.json again with transformers: `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"


def check(folder: Path, tokenizer: Tokenizer, *, alone: bool = False) -> None:
    """Raise `UsageError` if transformers would tokenize texts in another way than `tokenizer.json` says.

    `alone`: no other file of the folder counts.
    """
    settings = {} if alone else read_object(folder / "tokenizer_config.json")
    code = (settings.get("auto_map") or {}).get("AutoTokenizer") or []
    if others := [name for name in ([code] if isinstance(code, str) else code) if name and name not in _KNOWN_CODE]:
        raise UsageError(f"the tokenizer of {folder} has code of its own ({others[0]}), which is not run", _HINT)
    direction = (tokenizer.truncation or {}).get("direction", "right")
    if str(settings.get("truncation_side", direction)).lower() == "left":
        raise UsageError(
            f"the tokenizer of {folder} truncates at the start of a text, which is not supported",
            "set `truncation_side: right` in tokenizer_config.json if texts are not truncated",
        )
    name = str(settings.get("tokenizer_class") or "")
    kind = None if alone else read_object(folder / "config.json").get("model_type")
    if name in _BERT_CLASSES or (not name and kind in _BERT_TYPES):
        _check_normalizer(folder, tokenizer, settings)
        _check_ends(folder, tokenizer, _token(settings, "cls_token", "[CLS]"), _token(settings, "sep_token", "[SEP]"))
    elif name in _XLM_CLASSES:
        _check_ends(folder, tokenizer, _token(settings, "bos_token", "<s>"), _token(settings, "eos_token", "</s>"))


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
    wanted = _token(settings, "eos_token", "")
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


def lowers_case(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer itself turns text into lower case."""
    return tokenizer.normalizer is not None and "a" in tokenizer.normalizer.normalize_str("A")


def _check_normalizer(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    wanted = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is not False,
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True) is not False,
    ).normalize_str(_PROBE)
    found = tokenizer.normalizer.normalize_str(_PROBE) if tokenizer.normalizer else _PROBE
    if found != wanted:
        raise UsageError(
            f"tokenizer.json and tokenizer_config.json of {folder} disagree: the first turns {_PROBE!r} into {found!r}, "
            f"the second (do_lower_case, strip_accents, tokenize_chinese_chars) into {wanted!r}",
            _HINT,
        )


def _check_ends(folder: Path, tokenizer: Tokenizer, first: str, last: str) -> None:
    tokens = tokenizer.encode("a").tokens
    if (tokens[:1], tokens[-1:]) != ([first], [last]):
        raise UsageError(
            f"tokenizer.json and tokenizer_config.json of {folder} disagree: the first makes {' '.join(tokens)} of "
            f"'a', the second puts it between {first} and {last}",
            _HINT,
        )


def _token(settings: dict[str, Any], name: str, default: str) -> str:
    value = settings.get(name) or default
    return str(value.get("content", default) if isinstance(value, dict) else value)
