"""Output tokens/s of an engine without HTTP: `generation_engine.py transformers|openvino MODEL SEQUENCES... TOKENS`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

PROMPT = "the river carries small boats past old houses while people talk about weather and bread " * 7
ROUNDS = 3


def transformers(model: str, tokens: int) -> Callable[[int], object]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def run(count: int) -> object:
        batch = tokenizer([f"{number} {PROMPT}" for number in range(count)], return_tensors="pt", padding=True)
        with torch.inference_mode():
            return loaded.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return run


def openvino(gguf: str, tokens: int) -> Callable[[int], object]:
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(gguf, "CPU", scheduler_config=scheduler)
    config = openvino_genai.GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True)
    return lambda count: pipeline.generate([f"{number} {PROMPT}" for number in range(count)], config)


def main() -> None:
    engine, model, *counts, tokens = sys.argv[1:]
    run = {"transformers": transformers, "openvino": openvino}[engine](model, int(tokens))
    rates = {}
    for count in counts:
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.monotonic()
            run(int(count))
            seconds.append(time.monotonic() - started)
        rates[count] = int(count) * int(tokens) / statistics.median(seconds[1:])
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
