"""Compare half an A100 with a whole T4, every other slice, and busy neighbors: the tables of docs/estimate.md.

    python benchmarks/calibration/slices.py [--json FILE]

BERT-large in TensorRT on SQuAD lengths, p99 within 130 ms: this is what the rows ran, so every figure has an error
band.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rows import CONDITIONS, SLO, Samples, read

from inferctl.estimate import calibration
from inferctl.estimate.cost import BERT_LARGE
from inferctl.estimate.document import Question, build
from inferctl.estimate.forecast import Scenario

SLICES = {
    "40": ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"),
    "80": ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"),
}
CONFIG = {
    "model_type": "bert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keys = ["t4"]
    for size, names in SLICES.items():
        keys += [f"a100-{size}gb-mig-{name}" for name in names] + [f"a100-{size}gb-sxm"]
    samples = Samples(calibration.load().mean_length)
    found = build(
        keys,
        ["fp16", "int8"],
        CONFIG,
        Scenario(samples.lengths, engine="tensorrt"),
        Question(slo_p99_ms=SLO * 1000, against="t4"),
    )
    for precision in ("fp16", "int8"):
        print(f"\n{precision}\n")
        table([row for row in found["rows"] if row["precision"] == precision])
    loaded = neighbors(samples)
    print(
        "\n| busy neighbors | scenario | published | estimated for the slice alone | published / estimated |"
        "\n|---|---|---|---|---|"
    )
    for line in loaded:
        print(
            f"| {line['precision']} | {line['scenario']} | {line['given']:.0f}/s | {line['quiet']:.0f}/s "
            f"| {line['given'] / line['quiet']:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"slices": found, "neighbours": loaded}, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> None:
    print(
        "| hardware | based on | texts/s at p99 130 ms | relative to a T4 | single request p99 (ms)"
        " | break-even price of the whole GPU, in T4s | USD per 1M texts |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rate, single = row["highest_rate"], row["single_ms"]["p99"]
        against = row.get("against")
        ratio = whole = "1"
        if against:
            ratio = with_band(against["throughput"])
            whole = with_band(against["whole_gpu_break_even"])
        costs = ", ".join(f"{one['usd_per_million_texts']['value']:.3f} ({one['provider']})" for one in row["costs"])
        print(
            f"| {row['hardware']} | {row['basis']} | {with_band(rate, 0)} | {ratio} | {with_band(single)} | {whole} "
            f"| {costs} |"
        )


def with_band(value: dict[str, float], digits: int = 1) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} - {value['high']:.{digits}f})"


def neighbors(samples: Samples) -> list[dict[str, Any]]:
    """Return the published rates of the slice with six loaded neighbors, and the estimates for the slice alone."""
    lines = []
    for row in read():
        if row.part in CONDITIONS and "neighbours" in row.part:
            quiet = calibration.load().of(row.catalogued, row.precision)
            server = samples.server(quiet.cost(BERT_LARGE))
            value = server.offline().per_second if row.scenario == "Offline" else server.highest_rate(SLO)
            lines.append({"precision": row.precision, "scenario": row.scenario, "given": row.value, "quiet": value})
    return lines


if __name__ == "__main__":
    main()
