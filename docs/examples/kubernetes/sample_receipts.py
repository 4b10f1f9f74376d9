"""Writes the sample receipts of this example. Their figures are invented: `sample: true` says so in every output.

python docs/examples/kubernetes/sample_receipts.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferctl.facts import catalog
from inferctl.receipts import receipt

FOLDER = Path(__file__).resolve().parent / "receipts"
# Hardware, precision, requests/s within the SLO, seconds of a start, longest response (ms), cores, bytes of the server.
EMBED = [
    ("a100-half", "a100-40gb-mig-3g.20gb", "bf16", 400.0, 38.0, 420.0, 2.4, 3_900_000_000),
    ("l4", "l4", "bf16", 240.0, 36.0, 460.0, 2.1, 3_900_000_000),
    ("t4", "t4", "fp16", 72.0, 44.0, 610.0, 1.6, 3_800_000_000),
]
GENERATE = [
    ("a100-half", "a100-40gb-mig-3g.20gb", "bf16", 4.0, 95.0, 21_000.0, 1.8, 6_200_000_000),
    ("l4", "l4", "bf16", 2.25, 98.0, 27_000.0, 1.7, 6_200_000_000),
    ("t4", "t4", "fp16", 1.0, 120.0, 41_000.0, 1.6, 6_100_000_000),
]


def document(task: str, row: tuple[str, str, str, float, float, float, float, int]) -> dict[str, Any]:
    """Return a receipt with the invented figures of `row`."""
    name, key, precision, rate, start, longest, cores, size = row
    tokens: dict[str, float] = {"tokens_per_request": 250.0}
    if task == "generate":
        tokens = {"tokens_per_request": 512.0, "output_tokens_per_request": 128.0}
    return {
        "sample": True,
        "created": "2026-11-20T09:00:00+00:00",
        "inferctl": "sample",
        "configuration": {"name": f"{task}-{name}", "precision": precision, "url": None, "this_machine": True},
        "plan": {"name": "search", "load": {"task": task, "mode": "open"}},
        "slo": {},
        "model": {"source": "sample"},
        "precision": {"requested": precision, "effective": precision, "level": "native", "reason": "", "method": ""},
        "hardware": {"key": key, "name": catalog.hardware(key).name, "kind": "cuda", "detected_by": "sample"},
        "environment": {},
        "quality": {"checked": False, "reason": "a sample"},
        "resources": {"server_cores": cores, "server_peak_bytes": size},
        "runs": [{"repeat": 0, "ready_seconds": start, "records": []}],
        "search": {"verdict": "found", "max_goodput_rps": rate, "slo_p99_ms": 150.0 if task == "embed" else 100.0},
        "summary": {"requests_per_s": rate, **tokens, "latency_ms": {"max": longest}},
        "validity": {"valid": True, "reasons": [], "cautions": []},
    }


if __name__ == "__main__":
    for task, rows in (("embed", EMBED), ("generate", GENERATE)):
        for row in rows:
            receipt.write(FOLDER / f"{task}-{row[0]}.json", document(task, row))
