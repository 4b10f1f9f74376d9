"""Loads the adapters of tests/models/adapters.py into vLLM without inferctl: `python -m tests.serve.vllm_alone FOLDER`.

Prints as JSON which of them it serves, with the tokens of the base or others, and the numbers in its slots.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.models.adapters import HOSTILE, WRONG, write_wrong

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def slots(model: Any) -> int:
    """Return the numbers in the matrices that vLLM allocated for adapters."""
    found = 0
    for module in model.modules():
        for stacked in (getattr(module, "lora_a_stacked", ()), getattr(module, "lora_b_stacked", ())):
            found += sum(each.numel() for each in ([stacked] if isinstance(stacked, torch.Tensor) else stacked))
    return found


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(base := folder / "base")
    options: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64}
    options |= {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 64, "max_lora_rank": 16}
    llm = LLM(str(base), dtype="float32", **options)

    def tokens(adapter: LoRARequest | None = None) -> list[float]:
        options = SamplingParams(temperature=0, max_tokens=2, logprobs=1, detokenize=False)
        prompt = {"prompt_token_ids": [1, 2, 3]}
        (found,) = llm.generate(prompt, options, lora_request=adapter, use_tqdm=False)
        return [each.logprob for position in found.outputs[0].logprobs or () for each in position.values()]

    served: dict[str, str | None] = {}
    alone = tokens()
    for number, name in enumerate([*WRONG, *(name for name in HOSTILE if HOSTILE[name][2] is not None)], 1):
        adapter = LoRARequest(name, number, str(write_wrong(folder / str(number), base, name)))
        try:
            llm.llm_engine.add_lora(adapter)
        except Exception:  # noqa: BLE001  # of several types
            served[name] = None
        else:
            served[name] = "as the base" if tokens(adapter) == alone else "others"
    sys.stdout.write(json.dumps({"slots": llm.apply_model(slots)[0], "served": served}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
