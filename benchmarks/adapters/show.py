"""Serve the adapters of train.py with vLLM here, and ask each of them by name with OpenAI's client.

    python benchmarks/adapters/show.py models/SmolLM2-135M-Instruct adapters

Prints the figures of the start for each adapter: how close vLLM is to PEFT in fp32, next to the distance of the base.
Then it prints how many answers under each name have the form that each adapter was trained for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import openai
from train import ADAPTERS, questions

from inferctl.bench.load import child_server

FIGURES = ("top_1", "kl", "top_1_base", "kl_base", "kl_rounding")


def ask(client: openai.OpenAI, name: str, question: str) -> str:
    """Return the most likely answer under a name."""
    messages: Any = [{"role": "user", "content": question}]
    found = client.chat.completions.create(model=name, messages=messages, max_tokens=32, temperature=0)
    return (found.choices[0].message.content or "").strip()


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("error: expected two folders\n\nhint: run `python benchmarks/adapters/show.py MODEL_DIR ADAPTERS_DIR`")
    model, folder = (Path(name).resolve() for name in sys.argv[1:])
    adapters = [{"name": name, "source": str(folder / name)} for name in ADAPTERS]
    serve = {"max_context_tokens": 2048, "kv_cache": "1GiB", "vllm_options": ["--enforce-eager"]}
    with tempfile.TemporaryDirectory() as place:
        spec, announce = Path(place) / "inferctl.yaml", Path(place) / "ready.json"
        source = {"source": str(model), "adapters": adapters}
        spec.write_text(json.dumps({"name": "base", "model": source, "serve": serve}))
        command = child_server.serve_command(str(model), "base", spec)("auto", announce, None)
        with child_server.serve(command, announce, Path(place), lambda _: None) as server:
            info = server.connection.info
            effects = {each["name"]: each["next_tokens"] for each in info["adapters"]}
            print(f"ready after {info['ready_seconds']:.0f} s in {info['precision']['effective']}")
            print(f"{'name':10}" + "".join(f"{name:>12}" for name in (*FIGURES, *ADAPTERS)))
            client = openai.OpenAI(base_url=f"{server.connection.url}/v1", api_key="none", timeout=600)
            for name in ("base", *ADAPTERS):
                answers = [ask(client, name, question) for question in questions()]
                cells = [f"{effects[name][figure]:.4f}" if name in effects else "" for figure in FIGURES]
                cells += [f"{sum(map(form.fits, answers))}/{len(answers)}" for form in ADAPTERS.values()]
                print(f"{name:10}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
