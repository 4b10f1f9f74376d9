"""Compare int8 of all-MiniLM-L6-v2 on a CPU with bf16, fp32 and ONNX Runtime's int8: CPU time, cosine and recall.

    python benchmarks/engine/int8.py [--rounds 4] [--tokens 16384] [--json FILE]    # pip install onnx onnxruntime
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/engine/int8.py            # as on a CPU without AMX and bf16

ONNX Runtime quantizes dynamically, 8-bit weights by channel. All engines run in this process, in alternating order.
All texts of a batch have equal lengths, so none pads, and tokenization is not part of it. With the variable, which
limits oneDNN only, bf16 and ONNX Runtime are left out, and int8 has fp32 between the products.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
import contender
import peers

from inferctl.facts import precision

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in a server; else idle threads spin, and CPU time counts that
SIZES = [(count, tokens) for tokens in (16, 64, 256) for count in (1, 8, 64, 512)]
Run = Callable[[Sequence[Any]], Any]


def onnx_runtime(folder: Path) -> Run:
    """Return a function that embeds sequences, sorted by length, in batches of 32, with mean pooling."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(peers.MODEL, attn_implementation="eager").eval()

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    example, exported = torch.ones(2, 8, dtype=torch.int64), str(folder / "fp32.onnx")
    axes = {name: {0: "texts", 1: "tokens"} for name in ("ids", "mask", "hidden")}
    options = {"input_names": ["ids", "mask"], "output_names": ["hidden"], "dynamic_axes": axes, "dynamo": False}
    torch.onnx.export(Hidden(), (example, example), exported, **options)
    quantize_dynamic(exported, folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = len(os.sched_getaffinity(0))
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # CPU time is compared
    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), settings, providers=["CPUExecutionProvider"])

    def run(sequences: Sequence[Any]) -> Any:
        order, rows = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), {}
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            ids = np.zeros((len(part), len(sequences[part[-1]])), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, : len(sequences[i])], mask[row, : len(sequences[i])] = sequences[i], 1
            hidden = session.run(["hidden"], {"ids": ids, "mask": mask})[0]
            rows.update(zip(part, (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True), strict=True))
        return np.array([rows[i] / np.linalg.norm(rows[i]) for i in range(len(order))])

    return run


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the largest batch")
    parser.set_defaults(rounds=4)
    options = parser.parse_args()
    if limited := "ONEDNN_MAX_CPU_ISA" in os.environ:
        precision.best_precision = lambda _: "fp32"
    engines: dict[str, Run] = {}
    for name in ("int8", "fp32") if limited else ("int8", "bf16", "fp32"):
        run = contender.run_batches(name, str(peers.MODEL), "embed")
        engines[name] = lambda sequences, run=run: run(sequences, None)
    if not limited:
        with tempfile.TemporaryDirectory() as folder:
            engines["ONNX Runtime int8"] = onnx_runtime(Path(folder))
    seconds, rows, random = {}, [], np.random.default_rng(0)
    for count, tokens in (size for size in SIZES if size[0] * size[1] <= options.tokens):
        batch = list(random.integers(1000, 20_000, (count, tokens)).astype(np.int32))
        used: dict[str, list[float]] = {name: [] for name in engines}
        repeats = max(1, 512 // (count * tokens))
        for name in peers.order(list(engines), options.rounds + 1):  # the first round is the warm-up
            start = time.process_time()
            for _ in range(repeats):
                engines[name](batch)
            used[name].append((time.process_time() - start) / repeats)
        ratios = [[b / a for a, b in zip(used["int8"], other, strict=True)][1:] for other in used.values()]
        seconds[f"{count} x {tokens}"] = used
        rows.append((f"{count} x {tokens}", *map(peers.median, ratios[1:])))
        print(*rows[-1], file=sys.stderr, flush=True)
    peers.table(("texts x tokens", *(f"int8 is x {name}" for name in [*engines][1:])), rows)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(peers.MODEL)
    ids = [np.array(tokenizer(text)["input_ids"], np.int32)[:256] for text in peers.texts(500, seed=9)]
    reference = engines["fp32"](ids)
    quality = {name: peers.quality(run(ids), reference) for name, run in engines.items()}
    peers.table(("engine", "lowest cosine", "mean", "recall@10"), [(n, *q.values()) for n, q in quality.items()])
    peers.write(options.json, {"cpu_seconds": seconds, "quality": quality})


if __name__ == "__main__":
    main()
