"""Prints the numbers in the slots for adapters of vLLM without inferctl: `python -m tests.serve.vllm_alone FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def slots(model: Any) -> int:
    """Return the numbers in the matrices that vLLM allocated for adapters."""
    found = 0
    for module in model.modules():
        for stacked in (getattr(module, "lora_a_stacked", ()), getattr(module, "lora_b_stacked", ())):
            found += sum(each.numel() for each in ([stacked] if isinstance(stacked, torch.Tensor) else stacked))
    return found


if __name__ == "__main__":
    config = LlamaConfig(**SHAPE, num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(base := Path(sys.argv[1]) / "base")
    options: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64}
    options |= {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 64, "max_lora_rank": 16}
    sys.stdout.write(f"{LLM(str(base), dtype='float32', **options).apply_model(slots)[0]}\n")
