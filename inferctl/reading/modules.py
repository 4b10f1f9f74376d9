"""The modules of a model folder in the layout of sentence-transformers. Read without torch.

`modules.json` lists them in the order in which they run. The first one is Transformer, with its files in the folder
itself, or StaticEmbedding. Each other one has a folder of its own. Old and new releases of the library write different
packages of the same classes, so the last part of a type decides. Without `modules.json`, the library reads none of its
own files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError, shown
from inferctl.models import model
from inferctl.models.model import LIBRARY_FILE, STATIC, ModelFolder
from inferctl.models.untrusted import inside, read_json

PoolingMode: TypeAlias = Literal["cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last"]

# In the order in which the old flags are concatenated.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_MODES: dict[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
# Classes of torch without parameters that map each number of a vector. Dense has one of them.
ACTIVATIONS = frozenset(
    {"ELU", "GELU", "Hardtanh", "Identity", "LeakyReLU", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid"}
    | {"Softplus", "Softsign", "Tanh"}
)
ACTIVATION_PACKAGES = ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear")
# Settings of Transformer for the tokenizer, config.json and the weights, in old and new releases, and the ones among
# them that do not change what is computed.
_KWARGS = tuple(
    f"{name}_{end}"
    for name in ("processing", "processor", "tokenizer", "config", "model")
    for end in ("kwargs", "args")
)
_HARMLESS = frozenset(
    {"attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "padding", "return_tensors", "torch_dtype"}
    | {"trust_remote_code", "truncation", "use_safetensors"}
)
# Its other settings that are supported.
_SETTINGS = frozenset(
    {"do_lower_case", "max_seq_length", "modality_config", "module_output_name", "transformer_task", "unpad_inputs"}
)
# What each task of Transformer takes of the model, and its name for the next module.
_OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "fill-mask": ("logits", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "text-generation": ("logits", "causal_logits"),
}
# The files that hold the settings of Transformer: the newest name first.
_SETTINGS_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PACKAGE = "sentence_transformers"
# A length from here on is no limit.
NO_LIMIT = 1_000_000
_HINT = "use a model with Transformer, StaticEmbedding, Pooling, Dense, LayerNorm and Normalize modules"


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation, and optionally its input, projected if the sizes differ, added to the result.

    `folder`: of its weights, relative to the model folder. `activation`: a class of `torch.nn`.
    """

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalization with learned weights. `folder` is that of `Dense`."""

    folder: str
    dimension: int


@dataclass(frozen=True)
class Normalize:
    """Division by the L2 norm."""


@dataclass(frozen=True)
class LogitScore:
    """The logit of one token as the next one, less that of another one if there is one. Both are ids."""

    true_token: int
    false_token: int | None


Layer: TypeAlias = Dense | LayerNorm | Normalize | LogitScore


@dataclass(frozen=True)
class Modules:
    """What happens to the token vectors of the transformer, or to static ones.

    `pooling`: modes whose vectors are concatenated. `include_prompt`: whether the tokens of the prompt are pooled.
    `layers`: applied to the pooled vector, in order. `static`: as in `ModelFolder`.
    """

    pooling: tuple[PoolingMode, ...]
    include_prompt: bool = True
    layers: tuple[Layer, ...] = ()
    static: str | None = None


def read(folder: Path, task: Task) -> Modules | None:
    """Return the modules of a model folder; None if it lists none, or if the transformer alone computes the task.

    Raises `UsageError` for what `task` does not compute: other modules, and other settings of modules.
    """
    if not (folder / "modules.json").is_file():
        if task != "rerank":  # which renders pairs (`pair_template`)
            _refuse_chat_template(folder)
        return None
    # It would replace the modules that another class saved.
    loader = "SentenceTransformer" if task == "embed" else "CrossEncoder"
    if (saved := library_settings(folder).get("model_type", "SentenceTransformer")) != loader:
        raise UsageError(
            f"the modules of {folder} are those of a {saved}, not of a {loader}",
            f"save the model with {loader} of {_PACKAGE}, or remove modules.json if the transformer is enough",
        )
    first, *others = listed_modules(folder)
    entries = [first, *(entry for entry in others if entry[0] != "Dropout")]  # it does nothing after the training
    names = [name for name, _ in entries]
    if names[0] == STATIC and task == "embed":
        _check_outputs(folder, entries, task)
        layers = tuple(read_layer(folder, name, path) for name, path in entries[1:])
        return Modules(("mean",), layers=layers, static=first[1])
    alone = task != "embed" and len(entries) == 1
    wanted = "sequence-classification" if alone else "feature-extraction"
    if task == "rerank" and names[1:2] == ["LogitScore"]:
        wanted = "text-generation"
    check_transformer(folder, first, wanted, task=task)
    if alone:
        return None
    if task == "rerank" and names[1:] == ["LogitScore"]:
        return Modules(("last",), layers=(_logit_score(folder, entries[1][1]),))
    if names[1:2] != ["Pooling"]:
        found = f"no Pooling module after Transformer, but {names[1]}" if names[1:] else "no Pooling module"
        raise UsageError(f"{folder} has {found}: its vectors are those of tokens", _HINT)
    if "Pooling" in names[2:]:
        raise UsageError(f"{folder} has two Pooling modules", "remove one of them from modules.json")
    layers = tuple(read_layer(folder, name, path) for name, path in entries[2:])
    _check_outputs(folder, entries, task)
    pooling, include_prompt = _pooling(folder, entries[1][1])
    return Modules(pooling, include_prompt, layers)


def _refuse_chat_template(folder: Path) -> None:
    """Raise `UsageError` for a chat template, with which the library renders each text if there are no modules."""
    names = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if read_object(folder / "tokenizer_config.json").get("chat_template") or any((folder / n).exists() for n in names):
        raise UsageError(
            f"{folder} has a chat template and no modules.json, so {_PACKAGE} renders each text with the template, "
            "which is not supported",
            "remove the chat template if the model was trained with plain text",
        )


def transformer_settings(folder: Path) -> dict[str, Any]:
    """Return the content of the settings file of Transformer, under the name of any release; empty without one."""
    return next((found for name in _SETTINGS_FILES if (found := _library_file(folder, name))), {})


def library_settings(folder: Path) -> dict[str, Any]:
    """Return the content of `config_sentence_transformers.json`; empty without one."""
    return _library_file(folder, LIBRARY_FILE)


def _library_file(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name) if (folder / "modules.json").is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is none. Raises `UsageError` if it cannot be read."""
    data = read_json(path) if path.is_file() else None
    return data if isinstance(data, dict) else {}


def tokenizer_file(folder: Path, static: str | None = None) -> Path:
    """Return the `tokenizer.json` of a model, in `static` if that is its folder. Raises `UsageError` without one."""
    if not (file := folder / (static or "") / "tokenizer.json").is_file():
        hint = f"write a folder that has one: `inferctl convert {folder} NEW_FOLDER`"
        raise UsageError(f"{file.parent} has no tokenizer.json", hint)
    return file


def number(folder: Path, settings: Mapping[str, Any], name: str) -> int | None:
    """Return a number above 0 of the settings of a folder; None without one, and for no limit (1e30)."""
    value = settings.get(name)
    if value is None or (type(value) is float and value >= NO_LIMIT):
        return None
    if type(value) is not int or value < 1:
        raise UsageError(f"`{name}` of {folder} is {shown(value)}, not a number above 0", "correct the file")
    return value


def listed_modules(folder: Path, packages: Collection[str] = (_PACKAGE,)) -> list[tuple[str, str]]:
    """Return class name and folder of each module. Raises `UsageError` for classes of other packages."""
    listed = ModelFolder(folder).modules
    if not listed:
        raise UsageError(f"{folder / 'modules.json'} lists no modules", "download the model again")
    names = [entry["name"] for entry in listed if "name" in entry]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{folder} has two modules with the name {repeated[0]}", "give them different names")
    entries = []
    for entry in listed:
        package, _, name = str(entry.get("type", "")).rpartition(".")
        if package.partition(".")[0] not in packages:
            raise UsageError(
                f"{folder} has a module {entry.get('type')}, whose code is not that of {_PACKAGE}",
                "code of a model is not run; " + _HINT,
            )
        entries.append((name, str(entry.get("path", ""))))
    return entries


def check_transformer(
    folder: Path,
    entry: tuple[str, str],
    wanted: str = "feature-extraction",
    known: Collection[str] = (),
    task: Task = "embed",
) -> None:
    """Raise `UsageError` unless a first module is a Transformer in the folder itself that returns what is `wanted`.

    `known`: other settings that the caller reads.
    """
    name, path = entry
    default = "feature-extraction"
    if (name, wanted) == ("MLMTransformer", "fill-mask"):  # of old releases
        default = wanted
    elif name != "Transformer":
        raise UsageError(f"{folder} has a {name} module first, which is not supported", _HINT)
    if path not in ("", "."):
        raise model.transformer_below(folder, path)
    settings = transformer_settings(folder)
    if (found := settings.get("transformer_task", default)) != wanted:
        raise UsageError(f"the transformer of {folder} is made for {found}, not for {wanted}", "use another model")
    if changed := sorted(set(_changes(settings, task)).difference(known)):
        raise UsageError(
            f"{folder} sets {', '.join(changed)} in the settings of its Transformer module, which is not supported",
            "write these settings into config.json and the files of the tokenizer, and remove them there",
        )
    modality = "message" if task == "rerank" and "message" in (settings.get("modality_config") or {}) else "text"
    if modality == "text" and "message" in (settings.get("modality_config") or {}):
        raise UsageError(
            f"{folder} renders each text with a chat template, which is not supported", "use a model for plain text"
        )
    method = (settings.get("modality_config") or {}).get(modality) or {}
    taken, name = _OUTPUTS[wanted]
    if (method.get("method", "forward"), method.get("method_output_name", taken)) != ("forward", taken):
        raise UsageError(f"{folder} takes {method} of its transformer, which is not supported", "use another model")
    if (output := settings.get("module_output_name") or name) != name:
        raise UsageError(f"the transformer of {folder} returns {output}, not {name}", "use another model")


def _changes(settings: dict[str, Any], task: Task) -> Iterator[str]:
    """Yield the settings of Transformer that change what is computed, and that the server does not read."""
    yield from (name for name, value in settings.items() if value is not None and name not in {*_SETTINGS, *_KWARGS})
    for name in _KWARGS:
        found = settings.get(name) or {}
        kinds = [found]
        if name == "processing_kwargs":  # by modality, and `common`; those of the template are read for pairs
            kinds = [values for kind, values in found.items() if (kind, task) != ("chat_template", "rerank")]
        for values in kinds:
            yield from (f"{name}.{key}" for key in (values or {}) if key not in _HARMLESS)


def _check_outputs(folder: Path, entries: list[tuple[str, str]], task: Task) -> None:
    """Raise `UsageError` unless each Dense continues with the vector, and the last one of a reranker scores it."""
    for index, (name, path) in enumerate(entries):
        if name not in ("Dense", "Normalize"):
            continue
        settings = settings_of(folder, path)
        source = settings.get("module_input_name") or "sentence_embedding"
        target = settings.get("module_output_name") or source
        last = name == "Dense" and task != "embed" and index == len(entries) - 1
        if (source, target) != ("sentence_embedding", "scores" if last else "sentence_embedding"):
            raise UsageError(
                f"the {name} module in {path} of {folder} turns {source} into {target}", "use another model"
            )
    if task != "embed" and entries[-1][0] != "Dense":
        raise UsageError(f"the modules of {folder} return no scores", "use a reranker whose last module is Dense")


def settings_of(folder: Path, path: str) -> dict[str, Any]:
    """Return the settings of a module in the folder `path`."""
    return read_object(inside(folder, f"{path}/config.json"))


def _pooling(folder: Path, path: str) -> tuple[tuple[PoolingMode, ...], bool]:
    config = settings_of(folder, path)
    if not {"embedding_dimension", "word_embedding_dimension"} & config.keys():
        raise UsageError(f"{folder / path} has no configuration of a Pooling module", "download the model again")
    chosen = config.get("pooling_mode")
    unknown = [flag for flag, on in config.items() if flag.startswith("pooling_mode_") and on and flag not in _FLAGS]
    if chosen is None:
        names = [name for name in _FLAGS if config.get(name)] or ["pooling_mode_mean_tokens"]
        modes = [_FLAGS[name] for name in names]
    else:
        listed = chosen if isinstance(chosen, list) else [chosen]
        unknown = [str(mode) for mode in listed if mode not in _MODES]
        modes = [_MODES[mode] for mode in listed if mode in _MODES]
    if unknown or not modes:
        raise UsageError(
            f"pooling {' + '.join(unknown) or 'none'} of {folder} is not supported",
            f"use a model with {', '.join(sorted(set(_MODES.values())))}",
        )
    return tuple(modes), bool(config.get("include_prompt", True))


def read_layer(folder: Path, name: str, path: str) -> Layer:
    """Return a module that changes vectors. Raises `UsageError` for others, and without their sizes."""
    if name == "Normalize":
        return Normalize()
    settings = settings_of(folder, path)
    try:
        if name == "LayerNorm":
            return LayerNorm(path, int(settings["dimension"]))
        if name == "Dense":
            return Dense(
                path,
                int(settings["in_features"]),
                int(settings["out_features"]),
                bool(settings.get("bias", True)),
                _activation(folder, settings),
                bool(settings.get("use_residual", False)),
            )
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{folder / path / 'config.json'} has no sizes of a {name} module", "download the model again"
        ) from None
    raise UsageError(f"{folder} has a {name} module, which is not supported", _HINT)


def _logit_score(folder: Path, path: str) -> LogitScore:
    settings = settings_of(folder, path)
    true, false = settings.get("true_token_id"), settings.get("false_token_id")
    if type(true) is not int or not isinstance(false, int | None):
        raise UsageError(f"{folder / path / 'config.json'} has no ids of tokens", "download the model again")
    if (source := settings.get("module_input_name", "causal_logits")) != "causal_logits":
        raise UsageError(f"the LogitScore module of {folder} reads {source}, not causal_logits", "use another model")
    return LogitScore(true, false)


def _activation(folder: Path, settings: dict[str, Any]) -> str:
    named = str(settings.get("activation_function", "torch.nn.Tanh"))
    package, _, name = named.rpartition(".")
    if name not in ACTIVATIONS or package not in ACTIVATION_PACKAGES:
        raise UsageError(
            f"the activation {named} of a Dense module of {folder} is not supported",
            f"use a model with one of {', '.join(sorted(ACTIVATIONS))}",
        )
    return name
