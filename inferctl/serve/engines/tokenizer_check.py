"""The check at the start that the server tokenizes as transformers does with the same folder.

The API process runs `tokenizer.json` alone. transformers, with which the model was trained and is used elsewhere,
builds many tokenizers from their class, `tokenizer_config.json` and other files, and takes only the vocabulary from
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import transformers

from inferctl.core.errors import UsageError
from inferctl.reading import architecture, tokenizer_files
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.modules import read_object
from inferctl.reading.pair_template import PairTemplate
from inferctl.reading.rerank_config import RerankConfig
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.engines import plain
from inferctl.serve.text.rendered_pairs import TEMPLATE_ROOM
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import TokenizerPool

# Each has something that settings of tokenizers treat in two ways: case, accents (composed or not), scripts, widths,
# controls, blanks, numbers, punctuation, long words, and characters that no vocabulary has.
_PROBES = (
    "",
    "a",
    "Hello, World! Which RIVER flows through Vienna?",
    "naïve café Ångström ÀÉÎÕÜ ẞß İıIi",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m",
    "机器学习模型把文本变成向量。mixed中文words",
    "ひらがな カタカナ 한국어 ภาษาไทย हिन्दी עִבְרִית العَرَبِيَّة Ελληνικά Русский",
    "ﬁne ｆｕｌｌｗｉｄｔｈ ①②Ⅷ ½ ² ㎏ ﷺ",
    "🚀👩‍👩‍👧 🇦🇹 \U0001f9ff",
    " leading and trailing  two   three\t\ttabs\n\nlines\r\nend ",
    "\u00a0no-break\u2003em\u200bzero\u200d\u2060join\ufeffmark\u3000wide\u00adsoft",
    "nul\x00bell\x07\x1b[31m del\x7f \x85 \ufffd \ue000 \U000f0000 \U00013000",
    "0 7 42 1234567890 3.14159 1,234.56 -5 10^6 0x1F 2026-11-29",
    "don't we'll I'M they'VE O'Neil's 'quoted' \"double\" “curly” ‘single’ — – - … ...",
    "def f(x):\n    if x != y[0] and z <= 3:\n        return {**a, 'b': c}  # comment",
    "https://example.com/a_b?c=d&e=%20f user@example.com C++ C# #tag @name $5 50% a/b a\\b ~`^|",
    "!!!! ???? ,,,, ---- ==== ____ ((((",
    "▁under ##sub @@bpe </w> Ġspace Ċ",
    "x" * 99 + " " + "y" * 101 + " " + "z" * 201 + " " + "q" * 1001,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "the end [SEP] [CLS] [PAD] [UNK] [MASK] </s> <s> <pad> <unk> <mask> <|endoftext|> <bos> <eos> <|im_end|>",
    "[sep] <S> [mask]. a[SEP]b a <mask> b <mask>, c",
)
# At most so many pieces of the vocabulary, in texts of so many.
_PIECES, _PIECES_PER_TEXT = 256, 32
_SHOWN, _LONGEST = 8, 60  # tokens and characters in errors


def checked(folder: Path, config: TaskConfig) -> TokenizerPool:
    """Return the tokenizer of a model folder, with one thread.

    Raises `UsageError` as it does, if transformers does not know the type of the model, and if it makes other tokens or
    segments of some texts. Nothing is compared for static embeddings: sentence-transformers too runs `tokenizer.json`
    alone for them.
    """
    pool = TokenizerPool(folder, config, threads=1)
    if not isinstance(config, EmbeddingConfig) or config.static is None:
        _check(folder, config, pool)
    return pool


def _check(folder: Path, config: TaskConfig, pool: TokenizerPool) -> None:
    plain.silence_libraries()
    plain.check_type(architecture.native_config(folder))
    try:
        library = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **pool.transformers_options
        )
    except Exception as error:  # noqa: BLE001  # the files of a folder can fail in any way
        raise UsageError(
            f"transformers {transformers.__version__} cannot load the tokenizer of {folder}: "
            f"{type(error).__name__}: {error}",
            "correct `tokenizer_class` in tokenizer_config.json: `PreTrainedTokenizerFast` uses tokenizer.json alone",
        ) from None
    if isinstance(config, EmbeddingConfig) and config.tokens:  # as sentence-transformers and the pool add them
        library.add_tokens(list(config.tokens.markers), special_tokens=True)
    if config.lower_case and library.is_fast:
        library.backend_tokenizer.normalizer = tokenizer_files.with_lower_case(library.backend_tokenizer.normalizer)
    texts = [*_PROBES, *_own_probes(pool, library.get_added_vocab()), "start " + "a " * pool.max_tokens + "end"]
    if config.takes_texts:
        _compare(folder, pool, library, [(text,) for text in texts])
    if isinstance(config, RerankConfig) and config.template is not None:
        _compare_rendered(folder, pool, config.template, config.prompts.default_text, library, texts)
    elif config.takes_pairs:
        _compare(folder, pool, library, list(zip(texts, [*texts[1:], texts[0]], strict=True)))


def _compare(folder: Path, pool: TokenizerPool, library: Any, inputs: Sequence[tuple[str, ...]]) -> None:
    """Compare texts, or pairs of texts."""
    pairs = len(inputs[0]) == 2
    has_segments = pairs and (read_object(folder / "config.json").get("type_vocab_size", 2) or 0) > 1  # as BertConfig
    found = library(  # a list of lists, since a pair with an empty text alone counts as one text
        inputs if pairs else [text for (text,) in inputs],
        truncation="longest_first",
        max_length=pool.max_tokens,
        return_attention_mask=False,
    )
    expected_segments = found.get("token_type_ids") or [[0] * len(row) for row in found["input_ids"]]
    for given, expected, kinds in zip(inputs, found["input_ids"], expected_segments, strict=True):
        ids, second_start = _encoded(pool, given)
        if ids != expected:
            _fail(folder, library, given, ids, expected)
        segments = [int(at >= second_start) for at in range(len(ids))]
        if (has_segments or not pairs) and segments != kinds:
            raise UsageError(
                f"tokenizer.json of {folder} and its other files disagree about the segments of {_shown(given)}: the "
                f"server passes {segments[:_SHOWN]} to the model, transformers {transformers.__version__} "
                f"{kinds[:_SHOWN]}",
                "set `model_input_names` in tokenizer_config.json, with or without `token_type_ids`, as in training",
            )


def _compare_rendered(
    folder: Path, pool: TokenizerPool, template: PairTemplate, instruction: str, library: Any, texts: Sequence[str]
) -> None:
    """Compare pairs in their template, except what the server treats in its own way: control tokens and truncation."""
    assert pool.private is not None
    settings = {name: value for name, value in template.variables.items() if not name.endswith("_token")}
    plain_texts = [text for text in texts if not pool.private.is_in(text)]
    for given in (pair for text in plain_texts for pair in (("a query", text), (text, "a document"))):
        try:
            rendered = library.apply_chat_template(
                template.messages(*given, instruction), tokenize=True, return_dict=True, **settings
            )
            expected = rendered["input_ids"]
        except Exception as error:  # noqa: BLE001  # a template can fail in any way
            raise UsageError(
                f"transformers {transformers.__version__} cannot render the chat template of {folder}: {error}",
                "use another model",
            ) from None
        fits = len(expected) + TEMPLATE_ROOM <= pool.max_tokens
        if fits and (ids := _encoded(pool, given)[0]) != expected:
            _fail(folder, library, given, ids, expected)


def _encoded(pool: TokenizerPool, texts: Sequence[str]) -> tuple[list[int], int]:
    """Return the ids of a text or of a pair, and where its second segment starts."""
    try:
        if len(texts) == 1:
            (ids,) = pool.encode_now(texts, truncate=True, prompt="")
            second_start = len(ids)
        else:
            prompt = None if pool.private else ""  # a template has the instruction of the model
            ((ids, second_start),) = pool.encode_pairs_now(texts[0], texts[1:], truncate=True, prompt=prompt)
    except InputError as error:
        if error.code != "empty_input":
            raise
        return [], 0
    return ids.tolist(), second_start


def _fail(folder: Path, library: Any, texts: Sequence[str], ids: list[int], expected: list[int]) -> NoReturn:
    differ = [a != b for a, b in zip(ids, expected, strict=False)]
    first = differ.index(True) if any(differ) else len(differ)
    start = max(0, first - 2)
    ours, theirs = (
        " ".join(map(str, library.convert_ids_to_tokens(row[start : start + _SHOWN]))) or "nothing"
        for row in (ids, expected)
    )
    raise UsageError(
        f"tokenizer.json of {folder} and its other files disagree about {_shown(texts)}: the server makes {ours} of it "
        f"from token {start} on, transformers {transformers.__version__} makes {theirs}",
        "if tokenizer.json is right, set `tokenizer_class` in tokenizer_config.json to `PreTrainedTokenizerFast`; else "
        "write it again: `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`",
    )


def _shown(texts: Sequence[str]) -> str:
    return " and ".join(repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…") for text in texts)


def _own_probes(pool: TokenizerPool, added: Iterable[str]) -> list[str]:
    """Return texts of pieces of the vocabulary, and of the added tokens that the pool or transformers knows."""
    tokenizer = pool.own_tokenizer()
    size = tokenizer.get_vocab_size()
    pieces = [tokenizer.decode([id]) for id in range(0, size, -(-size // _PIECES))]
    batches = [" ".join(pieces[at : at + _PIECES_PER_TEXT]) for at in range(0, len(pieces), _PIECES_PER_TEXT)]
    own = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return [*batches, *(f"a {token} b{token}c {token.upper()}" for token in dict.fromkeys([*added, *own]))]
