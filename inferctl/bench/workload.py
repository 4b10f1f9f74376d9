"""What is sent, drawn from a seed before anything runs: request bodies, their order and, for an open loop, when each one leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inferctl import assets
from inferctl.bench.plan import Load
from inferctl.errors import UsageError, did_you_mean

ORDER_LENGTH = 65_536
# Marks where the load generator puts a number that no other request has: without it a server's cache would answer instead of its model.
SERIAL = "@SERIAL@"


@dataclass(frozen=True)
class Workload:
    """Inputs of all requests. `order[n % len(order)]` is the row of `groups` that the n-th request sends.

    `schedule_ns` (open loop; nanoseconds after the start of the measurement) and `warmup_schedule_ns` are empty for a closed loop.
    """

    groups: list[list[str]]
    order: npt.NDArray[np.uint32]
    schedule_ns: npt.NDArray[np.uint64]
    warmup_schedule_ns: npt.NDArray[np.uint64]
    unique: bool
    corpus_sha256: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of texts, order and times; equal digests mean equal work."""
        total = hashlib.sha256(json.dumps([self.groups, self.unique]).encode())
        for part in (self.order, self.schedule_ns, self.warmup_schedule_ns):
            total.update(part.tobytes())
        return total.hexdigest()

    def bodies(self, model: str) -> list[bytes]:
        """One JSON request body a group, each on one line."""
        mark = f"{SERIAL} " if self.unique else ""
        return [
            json.dumps({"model": model, "input": [mark + text for text in group], "encoding_format": "base64"}).encode()
            for group in self.groups
        ]


def draw(load: Load, corpus: str, seed: int) -> Workload:
    """The workload that `load`, `corpus` and `seed` stand for; the same ones always give the same workload."""
    texts, digest = read_corpus(corpus)
    random = np.random.Generator(np.random.PCG64(seed))
    size = load.inputs_per_request
    shuffled = random.permutation(len(texts))
    picks = (
        [shuffled[start : start + size] for start in range(0, len(texts) - size + 1, size)]
        if size > 1
        else shuffled[:, None]
    )
    if not len(picks):
        picks = [random.integers(0, len(texts), size)]
    groups = [[texts[i] for i in pick] for pick in picks]
    order = random.integers(0, len(groups), ORDER_LENGTH, dtype=np.uint32)
    empty = np.zeros(0, np.uint64)
    if load.mode == "closed":
        return Workload(groups, order, empty, empty, load.inputs == "unique", digest)
    schedule = arrivals(load, load.duration_s, random)
    # The warm-up may overrun by a window; were its schedule to end first, the measurement would begin with a rested server.
    warmup_s = load.warmup_s + 2 * load.window_s + 5 if load.warmup_s else 0.0
    return Workload(groups, order, schedule, arrivals(load, warmup_s, random), load.inputs == "unique", digest)


def arrivals(load: Load, seconds: float, random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """Times of an open loop within `seconds`, nanoseconds, ascending: Poisson or evenly spaced at `load.rate`."""
    rate = load.rate or 1.0
    if load.arrivals == "constant":
        times = np.arange(int(np.floor(seconds * rate + 1e-9))) / rate
    else:
        expected = seconds * rate
        gaps = random.exponential(1 / rate, int(expected + 10 * np.sqrt(expected) + 20))
        times = np.cumsum(gaps)
        times = times[times < seconds]
    return np.round(times * 1e9).astype(np.uint64)


def read_corpus(name: str) -> tuple[list[str], str]:
    """Texts of a corpus and the sha256 (hex) of its file: one of benchmarks/corpora, or a .jsonl or .txt file. Raises `UsageError`."""
    own = name.endswith((".jsonl", ".txt")) or "/" in name
    folder = assets.root() / "benchmarks" / "corpora"
    path = Path(name) if own else folder / f"{name}.jsonl"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.jsonl"))
        raise UsageError(
            f"there is no corpus {name!r}",
            did_you_mean(name, known) or f"known: {', '.join(known)}; or a .jsonl or .txt file",
        )
    content = path.read_bytes()
    texts = []
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for the end of a line.
    for number, line in enumerate(_decoded(path, content).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            texts.append(line if path.suffix == ".txt" else str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'{path}:{number}: not a line like {{"text": "..."}}',
                "give JSON lines, or one text a line in a .txt file",
            ) from None
    if not texts:
        raise UsageError(f"the corpus {path} is empty", "it needs one text a line")
    return texts, hashlib.sha256(content).hexdigest()


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 ({error.reason})", "convert the file, as with `iconv -f latin1 -t utf-8`"
        ) from None
