"""What manifests say about the model that a workload serves: its name, the size of its weights, its parallel sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core import document
from inferctl.core.errors import SpecError
from inferctl.manifests.kubernetes.fields import get
from inferctl.manifests.lint.manifests import ManifestContainer, ManifestWorkload

_OPTIONS = ("--model", "--model-id", "--model-path", "-m")
_VARIABLES = ("MODEL_ID", "MODEL_NAME", "MODEL", "HF_MODEL_ID", "INFERCTL_MODEL_SOURCE", "VLLM_MODEL")
# Images that start `vllm serve`, so that the first argument is the model.
_SERVE_IMAGE = re.compile(r"vllm-openai|vllm-cpu")
# What sets the format of the weights. Neither the cache of keys and values nor a draft model is among them.
_FORMAT = (
    *("--quantization", "--quantize", "-q", "--dtype", "--load-format", "--model-format", "--torchao-config"),
    *("--revision", "--served-model-name"),
)
_FORMAT_VARIABLES = ("QUANTIZE", "QUANTIZATION", "HF_MODEL_QUANTIZE", "DTYPE", "REVISION")
_FORMAT_WORD = re.compile(r"llama-server|llama\.cpp|ollama|--load[-_](?:in[-_])?[48]-?bit")
# Parameters in the name of a model: 7B, 0.5b, 8x7B. Not A3B, the active parameters of a mixture of experts.
_PARAMETERS = re.compile(r"(?<![A-Za-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,3})?)[bB](?![A-Za-z0-9])")
# Models of gpt-oss are published in MXFP4, and those of Ollama in 4 bits unless a name says otherwise.
_BITS = (
    (re.compile(r"exl[23]|bpw|bitnet|i?q[123]_", re.IGNORECASE), 0.2),
    (
        re.compile(r"awq|gptq|int4|4-?bit|w4a|bnb|nf4|nvfp4|mxfp4|bitsandbytes|q4_|q4-|gpt-oss|ollama", re.IGNORECASE),
        0.5,
    ),
    (re.compile(r"q[56]_", re.IGNORECASE), 0.65),
    (re.compile(r"fp8|int8|8-?bit|w8a8|q8_|eetq", re.IGNORECASE), 1.0),
    (re.compile(r"float32|fp32"), 4.0),
)
# The bits of such files and methods are not known without a word above.
_UNKNOWN_BITS = re.compile(
    r"gguf|llama\.cpp|llama-server|compressed-tensors|modelopt|torchao|quark|hqq|auto-?round", re.IGNORECASE
)
# Options that put a part of the weights into the memory of the host, or spread them over the GPUs of several pods.
_OFFLOAD = re.compile(r"--(?:cpu-offload-gb|n-gpu-layers|gpu-layers|(?:n-)?cpu-moe)|-ngl|-ncmoe")
# Options and variables that multiply the number of GPUs.
_PARALLEL = (
    (("--tensor-parallel-size", "-tp", "--tp-size", "--tp", "--num-shard"), ("NUM_SHARD", "SM_NUM_GPUS")),
    (("--pipeline-parallel-size", "-pp", "--pp-size"), ()),
)
_PYTHON = re.compile(r"(?:^|/)python[\d.]*$")
_SHARED_LAYERS = 0.8  # experts share attention and embeddings: 8x7B has 47, not 56, billion parameters


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of a model, and how they were found."""

    name: str
    size: float
    how: str


def name_of(workload: ManifestWorkload) -> str:
    """Return the model that the command line or the environment of a workload names; "" if neither does."""
    for container in workload.containers:
        words = container.expanded
        serve = [
            words[index + 1]
            for index, word in enumerate(words[:-1])
            if word == "serve" and index and words[index - 1].endswith(("vllm", "inferctl"))
        ]
        if not get(container.data, "command") and _SERVE_IMAGE.search(container.image):
            serve += container.programs[:1]
        named = [each for each in serve if not each.startswith("-")]
        found = [*values(container, _OPTIONS), *named, *values(container, (), _VARIABLES)]
        if found:
            return found[0].strip("'\"")
    return ""


def values(container: ManifestContainer, options: Sequence[str], variables: Sequence[str] = ()) -> list[str]:
    """Return the values of options in the command line of a container, then those of environment variables."""
    words, found = container.expanded, []
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        # vLLM accepts underscores. `python -m` is followed by a module.
        name = option.replace("_", "-") if option.startswith("--") else option
        if name in options and not (name == "-m" and any(_PYTHON.search(each) for each in words[:index])):
            found.append(value or (words[index + 1] if index + 1 < len(words) else ""))
    known = container.variables
    return [each for each in (*found, *(known.get(name, "") for name in variables)) if each]


def weights(workload: ManifestWorkload) -> Weights | None:
    """Return the memory that the model needs at least, from the parameters in its name."""
    name = name_of(workload)
    found = _PARAMETERS.search(name)
    if not found:
        return None
    words = [word for each in workload.containers for word in each.expanded]
    formats = [part for each in workload.containers for part in (each.image, *values(each, _FORMAT, _FORMAT_VARIABLES))]
    line = " ".join([name, *formats, *(word for word in words if _FORMAT_WORD.search(word))])
    width = next((width for pattern, width in _BITS if pattern.search(line)), None)
    if any(_OFFLOAD.fullmatch(word.partition("=")[0]) for word in words) or (
        width is None and _UNKNOWN_BITS.search(line)
    ):
        return None
    width = width or 2.0
    billions = float(found[2]) * (int(found[1]) * _SHARED_LAYERS if found[1] else 1)
    how = f"{billions:g} billion weights of {width:g} bytes are {billions * width:.1f} GB"
    return Weights(name, billions * width * 1e9, how)


def devices(workload: ManifestWorkload) -> int:
    """Return over how many GPUs a server spreads the weights: tensor times pipeline parallel size."""
    count = 1
    for options, variables in _PARALLEL:
        found = [value for each in workload.containers for value in values(each, options, variables)]
        numbers = [int(value[:4]) for value in found if value.isascii() and value.isdigit()]
        count *= max(1, next(iter(numbers), 1))
    return count


def yaml_documents(value: Any) -> list[dict[str, Any]]:
    """Return the YAML mappings in a value of a ConfigMap; none if it is something else."""
    if not isinstance(value, str) or "sharing" not in value:
        return []
    try:
        return [each.data for each in document.parse_all(value, "ConfigMap", "")]
    except SpecError:
        return []
