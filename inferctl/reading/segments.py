"""Whether the tokenizer of a model folder returns the segments of texts, from its small files."""

from __future__ import annotations

from pathlib import Path

from inferctl.core.errors import UsageError
from inferctl.reading.modules import read_object

# Classes of tokenizers that return the segments of texts unless `model_input_names` says otherwise, without their end
# `Tokenizer` or `TokenizerFast`, and types of models that have one of them if no file names a class.
_SEGMENT_CLASSES = frozenset(
    {"Bert", "Canine", "ConvBert", "DPRContextEncoder", "DPRQuestionEncoder", "Deberta", "DebertaV2", "Electra", "FNet"}
    | {"LayoutLM", "LayoutLMv2", "Lxmert", "MarkupLM", "MobileBert", "SqueezeBert", "Tapas"}
)
_SEGMENT_TYPES = frozenset(
    {"bert", "bros", "canine", "convbert", "deberta", "deberta-v2", "distilbert", "dpr", "electra", "ernie", "fnet"}
    | {"layoutlm", "layoutlmv2", "lxmert", "markuplm", "megatron-bert", "mobilebert", "nezha", "nomic_bert", "qdqbert"}
    | {"retribert", "squeezebert", "tapas", "visual_bert"}
)


def returns_segments(folder: Path) -> bool:
    """Return whether transformers 5 passes the segments of texts (`token_type_ids`) to the model of a folder."""
    settings, config = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    names = settings.get("model_input_names", [])
    if not isinstance(names, list) or (not names and "model_input_names" in settings):
        raise UsageError(
            f"`model_input_names` of {folder} is {names!r}, not a list of names", "correct tokenizer_config.json"
        )
    if names:
        return "token_type_ids" in names
    if name := settings.get("tokenizer_class") or config.get("tokenizer_class"):
        kind = str(name).removesuffix("Fast").removesuffix("Tokenizer")
        return kind in _SEGMENT_CLASSES or (kind == "CodeGen" and bool(settings.get("return_token_type_ids")))
    return config.get("model_type") in _SEGMENT_TYPES
