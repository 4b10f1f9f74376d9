"""What manifests say about the model that a workload serves: its name, the size of its weights, its positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from inferctl import document
from inferctl.deploy.kubernetes.fields import sequence, text
from inferctl.deploy.lint.finding import Context, ModelFacts
from inferctl.deploy.lint.manifests import Workload
from inferctl.errors import SpecError

_OPTIONS = ("--model", "--model-id", "--model-path", "-m")
_VARIABLES = ("MODEL_ID", "MODEL_NAME", "MODEL", "HF_MODEL_ID", "INFERCTL_MODEL_SOURCE", "VLLM_MODEL")
# Parameters in the name of a model: 7B, 0.5b, 8x7B. Not A3B, the active parameters of a mixture of experts.
_PARAMETERS = re.compile(r"(?<![A-Za-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,3})?)[bB](?![A-Za-z0-9])")
_ALIBI = re.compile(
    r"(?<![a-z])(?:mpt-\d|bloomz?(?![a-z])|falcon-rw|replit-code|jina-embeddings-v2|baichuan2?-13b|btlm-3b)",
    re.IGNORECASE,
)
# Models of gpt-oss are published in MXFP4, and those of Ollama in 4 bits unless a name says otherwise.
_BITS = (
    (re.compile(r"exl[23]|bpw|bitnet|i?q[123]_", re.IGNORECASE), 0.2),
    (
        re.compile(r"awq|gptq|int4|4-?bit|w4a|bnb|nf4|nvfp4|mxfp4|bitsandbytes|q4_|q4-|gpt-oss|ollama", re.IGNORECASE),
        0.5,
    ),
    (re.compile(r"q[56]_", re.IGNORECASE), 0.65),
    (re.compile(r"fp8|int8|8bit|w8a8|q8_", re.IGNORECASE), 1.0),
    (re.compile(r"float32|fp32"), 4.0),
)
# The bits of such files are not known without a word above.
_UNKNOWN_BITS = re.compile(r"gguf|llama\.cpp|llama-server", re.IGNORECASE)
# Options that put a part of the weights into the memory of the host, or spread them over the GPUs of several pods.
_OFFLOAD = re.compile(r"--(?:cpu-offload-gb|n-gpu-layers|gpu-layers|(?:n-)?cpu-moe)|-ngl|-ncmoe")
_PARALLEL = (("--tensor-parallel-size", "-tp", "--tp-size", "--tp"), ("--pipeline-parallel-size", "-pp", "--pp-size"))
_PYTHON = re.compile(r"(?:^|/)python[\d.]*$")
_SHARED_LAYERS = 0.8  # experts share attention and embeddings: 8x7B has 47, not 56, billion parameters


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of a model, and how they were found."""

    name: str
    size: float
    how: str


def facts(workload: Workload, context: Context) -> ModelFacts | None:
    """Return the facts of the model that `workload` serves: by name or label, or those of the only model."""
    names = {workload.object.name, *workload.labels.values()}
    for each in context.models:
        if each.name in names:
            return each
    return context.models[0] if len(context.models) == 1 else None


def name_of(workload: Workload) -> str:
    """Return the model that the command line or the environment of a workload names; "" if neither does."""
    for container in workload.containers:
        words = container.words
        for index, word in enumerate(words):
            option, _, value = word.partition("=")
            # `python -m` is followed by a module.
            if option in _OPTIONS and not (option == "-m" and any(_PYTHON.search(each) for each in words[:index])):
                found = value or (words[index + 1] if index + 1 < len(words) else "")
                if found:
                    return found.strip("'\"")
            if word == "serve" and index and words[index - 1].endswith(("vllm", "inferctl")) and words[index + 1 :]:
                following = words[index + 1]
                if not following.startswith("-"):
                    return following.strip("'\"")
        for variable in sequence(container.data, "env"):
            if text(variable, "name") in _VARIABLES and text(variable, "value"):
                return text(variable, "value")
    return ""


def alibi_model(workload: Workload, context: Context) -> str | None:
    """Return the name of the model if its positions are ALiBi biases; None if not, or if that is unknown."""
    known = facts(workload, context)
    if known is not None and known.alibi is not None:
        return known.name if known.alibi else None
    name = name_of(workload)
    return name if _ALIBI.search(name) else None


def weights(workload: Workload, context: Context) -> Weights | None:
    """Return the memory that the model needs at least: from the context, else from the parameters in its name."""
    known = facts(workload, context)
    if known is not None and known.memory_bytes:
        return Weights(known.name, known.memory_bytes, f"it needs {known.memory_bytes / 1e9:.1f} GB")
    name = name_of(workload)
    found = _PARAMETERS.search(name)
    if not found:
        return None
    words = [word for each in workload.containers for word in each.words]
    line = " ".join([name, *words, *(each.image for each in workload.containers)])
    width = next((width for pattern, width in _BITS if pattern.search(line)), None)
    if any(_OFFLOAD.fullmatch(word.partition("=")[0]) for word in words) or (
        width is None and _UNKNOWN_BITS.search(line)
    ):
        return None
    width = width or 2.0
    billions = float(found[2]) * (int(found[1]) * _SHARED_LAYERS if found[1] else 1)
    how = f"{billions:g} billion weights of {width:g} bytes are {billions * width:.1f} GB"
    return Weights(name, billions * width * 1e9, how)


def devices(workload: Workload) -> int:
    """Return over how many GPUs the command line spreads the weights: tensor times pipeline parallel size."""
    words = [word for each in workload.containers for word in each.words]
    count = 1
    for options in _PARALLEL:
        for index, word in enumerate(words):
            option, _, value = word.partition("=")
            value = value or (words[index + 1] if index + 1 < len(words) else "")
            if option in options and value.isascii() and value.isdigit():
                count *= max(1, int(value[:4]))
                break
    return count


def yaml_documents(value: Any) -> list[dict[str, Any]]:
    """Return the YAML mappings in a value of a ConfigMap; none if it is something else."""
    if not isinstance(value, str) or "sharing" not in value:
        return []
    try:
        return [each.data for each in document.parse_all(value, "ConfigMap", "")]
    except SpecError:
        return []
