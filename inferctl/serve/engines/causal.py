"""The reference implementation of next-token log-probabilities: transformers, fp32, CPU, one text at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from inferctl.core import cgroup
from inferctl.core.errors import UsageError
from inferctl.models import conversion
from inferctl.models.adapter import Adapter
from inferctl.models.divergence import REFERENCE_TOKENS
from inferctl.serve.engines import plain, weights

# Bounds the logits of one text in memory: 256 MB for a vocabulary of 256,000 tokens.
MAX_TEXT_TOKENS = 256
# Positions whose log-probabilities are in memory at a time.
_POSITIONS = 32
# Quantized formats with one weight and one scale per layer.
_READABLE = ("compressed-tensors int-quantized", "compressed-tensors float-quantized")


class CausalModel:
    """A generative model in fp32 and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Load a model folder. Weights in compressed-tensors' int8 are dequantized.

        Raises `UsageError` if transformers cannot read the folder, or the weights have another quantized format.
        """
        plain.silence_libraries()
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(min(cgroup.cores(), torch.get_num_threads()))
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"transformers cannot read {folder}: {error}", "use a model that transformers knows"
            ) from None
        loader: Any = AutoModelForCausalLM
        source: dict[str, Any] = {"config": config}
        if getattr(config, "quantization_config", None):
            del config.quantization_config
            loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            source |= {"pretrained_model_name_or_path": None, "state_dict": _dequantized(folder)}
        self._model = weights.load(loader, folder, "generate", torch.float32, **source)

    def encode(self, text: str | list[dict[str, str]]) -> list[int] | None:
        """Return the first token ids of a text or of chat messages.

        Chat messages end with the start of the response. None for them if the model has no chat template.
        """
        if isinstance(text, str):
            ids = self._tokenizer(text)["input_ids"]
        elif self._tokenizer.chat_template is None:
            return None
        else:
            ids = self._tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [int(value) for value in ids[:MAX_TEXT_TOKENS]]

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[None]:
        """Add what an adapter adds to the outputs of its layers, as PEFT does. The weights do not change.

        Raises `UsageError` if transformers has other names for the layers than the files.
        """
        modules = dict(self._model.named_modules())
        with ExitStack() as hooks:
            for name, (a, b) in conversion.matrices(adapter).items():
                if name not in modules:
                    raise UsageError(f"transformers has no layer {name} in this model", "use the model without it")
                hook = modules[name].register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
                hooks.callback(hook.remove)
            yield

    @torch.inference_mode()
    def score(self, ids: list[int]) -> dict[str, Any]:
        """Return what the reference prints for the tokens of one text, position by position without the last.

        `logprobs`: of the next token of the text. `top_ids` and `top_logprobs`: the most likely tokens, the best first.
        """
        tokens = torch.tensor([ids])
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1]
        found: dict[str, Any] = {"ids": ids, "logprobs": [], "top_ids": [], "top_logprobs": []}
        for start in range(0, len(logits), _POSITIONS):
            logprobs = torch.log_softmax(logits[start : start + _POSITIONS].float(), dim=-1)
            following = tokens[0, start + 1 : start + 1 + len(logprobs), None]
            best = logprobs.topk(min(REFERENCE_TOKENS, logprobs.shape[1]))
            found["logprobs"] += _rounded(logprobs.gather(1, following)[:, 0])
            found["top_ids"] += best.indices.tolist()
            found["top_logprobs"] += _rounded(best.values)
        return found


def _rounded(values: torch.Tensor) -> Any:
    return values.double().round(decimals=6).tolist()


def _dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of an 8-bit checkpoint of compressed-tensors, those with a scale as float32."""
    from safetensors.torch import load_file

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    name = f"{stored.get('quant_method')} {stored.get('format', '')}".strip()
    if name not in _READABLE:
        raise UsageError(
            f"the fp32 reference cannot read weights in {name}", "compare with the folder of the original weights"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale")}
    return {
        name: tensor.float() * scales[f"{name}_scale"].float() if f"{name}_scale" in scales else tensor
        for name, tensor in tensors.items()
    }
