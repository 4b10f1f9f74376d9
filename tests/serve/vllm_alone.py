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

from tests.models.adapters import WRONG, write_adapter

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
    llm = LLM(
        model=str(base),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=len(WRONG),
        max_lora_rank=16,
    )

    def tokens(adapter: LoRARequest | None = None) -> list[float]:
        options = SamplingParams(temperature=0, max_tokens=2, logprobs=1, detokenize=False)
        prompt = {"prompt_token_ids": [1, 2, 3]}
        (found,) = llm.generate(prompt, options, lora_request=adapter, use_tqdm=False)
        return [each.logprob for position in found.outputs[0].logprobs or () for each in position.values()]

    served: dict[str, str | None] = {}
    alone = tokens()
    for number, (name, (edit, _, comes_back)) in enumerate(WRONG.items(), 1):
        if comes_back is None:
            continue
        adapter = LoRARequest(name, number, str(write_adapter(folder / str(number), base, edit)))
        try:
            llm.llm_engine.add_lora(adapter)
        except Exception:  # noqa: BLE001  # of several types
            served[name] = None
            continue
        served[name] = "as the base" if tokens(adapter) == alone else "others"
    sys.stdout.write(json.dumps({"slots": slots_of(llm), "served": served}) + "\n")


def slots_of(llm: LLM) -> int:
    return int(llm.apply_model(slots)[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
