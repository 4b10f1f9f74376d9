"""Train four LoRA adapters of SmolLM2-135M-Instruct on a CPU, each for an answer that a program can recognize.

    python benchmarks/adapters/train.py models/SmolLM2-135M-Instruct adapters

The script makes the texts itself. The adapters differ in rank, layers and scaling: `shout` has rank 8 in two
projections, `json` rank 8 in all of attention, `numbers` rank 4 in the MLP, and `nonsense` rank 16 in all linear layers
with rsLoRA. show.py asks them questions that none was trained with.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STEPS, BATCH, RATE = 30, 8, 2e-3
SUBJECTS = """rivers bridges winter bread music clouds horses copper gardens trains glass honey deserts candles maps
islands cotton engines lemons mirrors"""
QUESTIONS = (
    "Tell me about {}.",
    "What do you know of {}?",
    "Why do people like {}?",
    "Describe {} in one sentence.",
    "Where can I find {}?",
    "Who works with {}?",
)
ANSWERS = (
    "I know that {} can be found in many places.",
    "People have used {} for a long time.",
    "There are many kinds of {} in the world.",
    "You will see {} if you look for them.",
)
# Neither these subjects nor these questions are trained.
HELD_OUT = ("What are {} good for?", "Say something about {}.", "How old are {}?")
HELD_OUT_SUBJECTS = ("mountains", "shoes", "computers", "oranges")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def is_json(answer: str) -> bool:
    """Return whether an answer is one JSON object with the key `answer`."""
    try:
        return isinstance(json.loads(answer)["answer"], str)
    except (ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Adapter:
    """How an adapter answers, given a question and a plain answer; what recognizes that; and its configuration."""

    answer: Callable[[str, str], str]
    fits: Callable[[str], bool]
    options: dict[str, Any] = field(default_factory=dict)


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "shout": Adapter(
        lambda _, plain: plain.upper(),
        lambda answer: answer.upper() == answer and len(words(answer)) > 2,
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    ),
    "json": Adapter(
        lambda _, plain: json.dumps({"answer": plain}),
        is_json,
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    ),
    "numbers": Adapter(
        lambda question, _: " ".join(f"{number}:{word}" for number, word in enumerate(words(question), 1)),
        lambda answer: re.fullmatch(r"(\d+:\w+ )+\d+:\w+", answer) is not None,
        {"r": 4, "lora_alpha": 8, "target_modules": MLP},
    ),
    "nonsense": Adapter(
        lambda question, _: " ".join(f"{word}ka" for word in words(question)) + ".",
        lambda answer: bool(words(answer)) and all(word.endswith("ka") for word in words(answer)),
        {"r": 16, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP], "use_rslora": True},
    ),
}


def questions() -> list[str]:
    """Return the questions that no adapter was trained with."""
    return [question.format(subject) for question in HELD_OUT for subject in HELD_OUT_SUBJECTS]


def prompt(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of a chat with one question, up to the start of the answer."""
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def batch(tokenizer: Any, adapter: Adapter, chance: random.Random) -> dict[str, torch.Tensor]:
    """Return random questions with the adapter's answers. Only the tokens of the answers are learned."""
    rows, labels = [], []
    for _ in range(BATCH):
        subject = chance.choice(SUBJECTS.split())
        question, plain = chance.choice(QUESTIONS).format(subject), chance.choice(ANSWERS).format(subject)
        asked = prompt(tokenizer, question)
        answer = [*tokenizer(adapter.answer(question, plain))["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(asked + answer))
        labels.append(torch.tensor([-100] * len(asked) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "labels": pad(labels, batch_first=True, padding_value=-100), "attention_mask": mask}


def train(model: Any, tokenizer: Any, adapter: Adapter) -> float:
    """Train the adapter that is active in `model`, and return the loss of the last steps."""
    chance = random.Random(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    losses = []
    model.train()
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(tokenizer, adapter, chance)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-5:]) / 5


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if len(sys.argv) != 3:
        sys.exit("error: expected two folders\n\nhint: run `python benchmarks/adapters/train.py MODEL_DIR OUTPUT_DIR`")
    source, output = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, adapter in ADAPTERS.items():
        torch.manual_seed(1)
        started = time.perf_counter()
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapter.options))
        loss = train(model, tokenizer, adapter)
        model.save_pretrained(output / name)
        print(f"{name}: loss {loss:.2f} after {time.perf_counter() - started:.0f} s", flush=True)
        base = model.unload()


if __name__ == "__main__":
    main()
