"""Serve four adapters, and their merged models, with vLLM here: who is applied, and what an adapter costs.

    python benchmarks/adapters/show.py models/SmolLM2-135M-Instruct adapters

`adapters` is the folder of `train.py`. Prints for each adapter the figures of the start (top-1 agreement and KL
divergence, next to those of the base), and in which form OpenAI's client gets answers under its name. Then it measures
the tokens per second of eight clients for the base, one adapter, all four in turn, and a merged model on a server of its
own: interleaved, in alternating order, as ratios to the base in the same round.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from train import ADAPTERS, questions

INFERCTL = [sys.executable, "-m", "inferctl"]
ROUNDS, CLIENTS, TOKENS = 6, 8, 24
FIGURES = ("top_1", "kl", "top_1_base", "kl_base", "kl_rounding")


@contextmanager
def serving(model: Path, name: str, adapters: Sequence[Path] = ()) -> Iterator[str]:
    """Run a server of a model and yield its address."""
    listed = [{"name": path.name, "source": str(path.resolve())} for path in adapters]
    serve = {"max_context_tokens": 2048, "kv_cache": "1GiB", "port": 0, "vllm_options": ["--enforce-eager"]}
    spec = {"name": name, "model": {"source": str(model.resolve()), "adapters": listed}, "serve": serve}
    with tempfile.TemporaryDirectory() as folder:
        file, announce = Path(folder) / "inferctl.yaml", Path(folder) / "ready.json"
        file.write_text(json.dumps(spec))
        server = subprocess.Popen([*INFERCTL, "serve", "--spec", str(file), "--announce", str(announce)])
        try:
            while not announce.exists():
                if server.poll() is not None:
                    sys.exit(server.returncode)
                time.sleep(0.2)
            yield json.loads(announce.read_text())["url"]
        finally:
            server.terminate()
            server.wait()


def show_effects(url: str) -> None:
    """Print what the start measured of each adapter, and how many answers under its name have each form."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    effects = {each["name"]: each["next_tokens"] for each in httpx.get(f"{url}/info").json()["adapters"]}
    print(f"\n{'name':10}" + "".join(f"{name:>13}" for name in (*FIGURES, *ADAPTERS)))
    for card in client.models.list().data:
        answers = [ask(client, card.id, question) for question in questions()]
        figures = [f"{effects[card.id][name]:.4f}" if card.id in effects else "" for name in FIGURES]
        counts = [f"{sum(map(form.fits, answers))}/{len(answers)}" for form in ADAPTERS.values()]
        print(f"{card.id:10}" + "".join(f"{value:>13}" for value in (*figures, *counts)), flush=True)


def ask(client: openai.OpenAI, name: str, question: str) -> str:
    """Return the most likely answer under a name."""
    messages: Any = [{"role": "user", "content": question}]
    found = client.chat.completions.create(model=name, messages=messages, max_tokens=32, temperature=0)
    return (found.choices[0].message.content or "").strip()


async def tokens_per_second(targets: Sequence[tuple[str, str]]) -> float:
    """Return the rate of clients that ask at the same time, each for the next one of `targets` (address, name)."""

    async def run(url: str, name: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
            options: Any = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
            await client.completions.create(model=name, prompt="Tell me about bridges.", **options)

    started = time.perf_counter()
    await asyncio.gather(*(run(*target) for target in itertools.islice(itertools.cycle(targets), CLIENTS)))
    return CLIENTS * TOKENS / (time.perf_counter() - started)


def compare(arms: dict[str, list[tuple[str, str]]]) -> None:
    """Print the rate of each arm relative to the first one: the median over rounds, and the range."""
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, ROUNDS):  # the first round warms up
        order = list(arms) if number % 2 else list(reversed(arms))
        rates = {name: asyncio.run(tokens_per_second(arms[name])) for name in order}
        if number >= 0:
            for name, rate in rates.items():
                ratios[name].append(rate / rates[next(iter(arms))])
    print(f"\ntokens/s of {CLIENTS} clients, relative to the base, {ROUNDS} rounds")
    for name, found in ratios.items():
        print(f"{name:14}{statistics.median(found):6.2f}   ({min(found):.2f} to {max(found):.2f})")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("error: expected two folders\n\nhint: run `python benchmarks/adapters/show.py MODEL_DIR ADAPTERS_DIR`")
    model, folder = map(Path, sys.argv[1:])
    adapters = [folder / name for name in ADAPTERS]
    with tempfile.TemporaryDirectory() as place:
        merged = Path(place) / "merged"
        subprocess.run([*INFERCTL, "merge", str(model), str(adapters[0]), "--output", str(merged)], check=True)
        with serving(model, "base", adapters) as url, serving(merged, "merged") as other:
            show_effects(url)
            arms = {"base": [(url, "base")], "one adapter": [(url, adapters[0].name)]}
            arms |= {"four mixed": [(url, path.name) for path in adapters], "merged": [(other, "merged")]}
            compare(arms)


if __name__ == "__main__":
    main()
