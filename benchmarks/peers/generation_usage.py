"""Compare the ledger with vLLM's own counts, for random requests to all APIs of generation by the official clients.

    VENV/bin/python benchmarks/peers/generation_usage.py [REQUESTS] >usage.json

Run it with a Python that has vLLM, anthropic and inferctl. The model is the first two layers of SmolLM2 (`make
generator`) with random weights. A quarter of the clients leave before the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peers

sys.path.insert(0, str(peers.ROOT))

from inferctl.serve.generate.protocols import ENDPOINTS
from tests.processes import ServerProcess, until
from tests.serve.random_requests import Asked, Clients
from tests.tenancy.key_files import add

SPEC = {
    "name": "smollm2",
    "model": {"source": str(peers.ROOT / "models" / "SmolLM2-135M-Instruct")},
    "access": {"keys": "./keys.json"},
    "metering": {"mode": "on"},
    "serve": {
        "precision": "fp32",
        "max_context_tokens": 2048,
        "kv_cache": "1GiB",
        "port": 0,
        "vllm_options": [
            "--enforce-eager",
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "hermes",
            "--load-format",
            "dummy",
            "--hf-overrides",
            '{"num_hidden_layers":2}',
        ],
    },
}


def compare(server: ServerProcess, admin: str, key: str, count: int) -> dict[str, Any]:
    """Send the requests, and return the sums of the clients, the ledger and vLLM."""
    requests = [Asked.number(number) for number in range(count)]
    seen = asyncio.run(Clients(server.url, key).run(requests, 8))
    until(lambda: sum(row["requests"] for row in server.usage("endpoint")) >= count)
    clients = {name: Counter[str]() for name in ENDPOINTS.values()}
    for asked, each in zip(requests, seen, strict=True):
        clients[asked.api].update(requests=1, left=each.left)
        if not each.left:
            clients[asked.api].update(input=each.prompt, output=each.output, cached=each.cached or 0)
    fields = {"requests": "requests", "input": "input_tokens", "output": "output_tokens", "cached": "cached_tokens"}
    ledger = [
        {"endpoint": row["endpoint"], "status": row["status"], **{name: row[field] for name, field in fields.items()}}
        for row in server.usage("endpoint", "status")
        if row["endpoint"] in clients
    ]
    metrics = server.get("/metrics", admin).text.splitlines()
    vllm = next(float(line.split()[-1]) for line in metrics if line.startswith("vllm:generation_tokens_total"))
    return {
        "clients": clients,
        "ledger": ledger,
        "output_tokens": {"ledger": sum(row["output"] for row in ledger), "vllm": vllm},
        "equal": all(_equal(row, clients[row["endpoint"]]) for row in ledger if row["status"] == 200)
        and sum(row["output"] for row in ledger) == vllm,
    }


def _equal(row: dict[str, Any], of_clients: Counter[str]) -> bool:
    """Whether a row of completed requests has the sums of their clients."""
    names = ["input", "output"]
    if row["endpoint"] in ("responses", "messages"):  # of several sequences, vLLM reports the cached tokens of one
        names.append("cached")
    complete = of_clients["requests"] - of_clients["left"]
    return row["requests"] == complete and all(row[name] == of_clients[name] for name in names)


def main() -> None:
    """Print the comparison as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inferctl.yaml").write_text(json.dumps(SPEC))
        (_, admin), (_, key) = add(folder / "keys.json", "admin", admin=True), add(folder / "keys.json", "user")
        server = ServerProcess.launch(folder, "inferctl.serve", "--spec", "inferctl.yaml", "--log", "json")
        try:
            server.wait_announced(600)
            print(json.dumps(compare(server, admin, key, int(sys.argv[1]) if len(sys.argv) > 1 else 500), indent=1))
        finally:
            server.stop()
            server.kill()


if __name__ == "__main__":
    main()
