"""Serve a language model with vLLM here, chat with it, benchmark it and write a report: `make demo-generate`.

python benchmarks/demo_generate.py models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

QUESTION = "What is the capital of France?"
INFERCTL = [sys.executable, "-m", "inferctl"]


def main() -> None:
    model = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        announce = Path(folder) / "ready.json"
        spec = Path(folder) / "inferctl.yaml"
        # Compilation makes decoding up to a fifth faster, but doubles the time of the start.
        serve = {"max_context_tokens": 2048, "kv_cache": "2GiB", "port": 0, "vllm_options": ["--enforce-eager"]}
        spec.write_text(
            json.dumps({"name": "smollm2", "model": {"source": str(Path(model).resolve())}, "serve": serve})
        )
        server = subprocess.Popen([*INFERCTL, "serve", "--spec", str(spec), "--announce", str(announce)])
        try:
            while not announce.exists():
                if server.poll() is not None:
                    sys.exit(server.returncode)
                time.sleep(0.2)
            url = json.loads(announce.read_text())["url"]
            chat(url)
            bench = ["bench", "--url", f"smollm2={url}", "--model", model, "--plan", "quick", "--output", "demo"]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            code = subprocess.run(
                [*INFERCTL, *bench, "--report", "demo/generate.html"], env=environment, check=False
            ).returncode
        finally:
            server.terminate()
            server.wait()
    sys.exit(code)


def chat(url: str) -> None:
    """Print a question and the answer, as its tokens arrive."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    print(f"\n> {QUESTION}", flush=True)
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    for chunk in client.chat.completions.create(
        model="smollm2", messages=messages, max_tokens=64, temperature=0, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print("\n", flush=True)


if __name__ == "__main__":
    main()
