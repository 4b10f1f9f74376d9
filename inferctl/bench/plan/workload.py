"""What is sent, drawn from a seed before anything runs: request bodies, their order and, for an open loop, when each one leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl import assets
from inferctl.bench.plan import traces
from inferctl.bench.plan.plan import Load, Stage
from inferctl.errors import UsageError, did_you_mean

ORDER_LENGTH = 65_536
# Marks where the load generator puts a number that no other request has: without it a server's cache would answer instead of its model.
SERIAL = "@SERIAL@"


@dataclass(frozen=True)
class Workload:
    """Inputs of all requests. `order[n % len(order)]` is the row of `groups` that the n-th request sends.

    `schedule_ns` (open loop; nanoseconds after the start of the measurement) and `warmup_schedule_ns` are empty for a closed loop.
    Groups from `unique_from` on get a serial number each time they are sent; those before are sent as they are.
    """

    groups: list[list[str]]
    order: npt.NDArray[np.uint32]
    schedule_ns: npt.NDArray[np.uint64]
    warmup_schedule_ns: npt.NDArray[np.uint64]
    unique_from: int
    corpus_sha256: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of texts, order and times; equal digests mean equal work."""
        marks = self.unique_from == 0 if self.unique_from in (0, len(self.groups)) else self.unique_from
        total = hashlib.sha256(json.dumps([self.groups, marks]).encode())
        for part in (self.order, self.schedule_ns, self.warmup_schedule_ns):
            total.update(part.tobytes())
        return total.hexdigest()

    def bodies(self, body: Callable[[list[str]], dict[str, Any]]) -> list[bytes]:
        """Return one JSON request body per group, each on one line; `body` makes it from the texts (`Target.body`)."""
        return [
            json.dumps(body(texts)).encode()
            for texts in (
                [f"{SERIAL} {text}" for text in group] if number >= self.unique_from else group
                for number, group in enumerate(self.groups)
            )
        ]

    def repeated(self, requests: int) -> float:
        """Share of the first `requests` requests whose whole input was sent before among them: what a cache could answer at most."""
        rows = np.resize(self.order, requests)
        as_they_are = rows[rows < self.unique_from]
        return float(len(as_they_are) - len(np.unique(as_they_are))) / requests if requests else 0.0


def draw(load: Load, corpus: str, seed: int) -> Workload:
    """The workload that `load`, `corpus` and `seed` stand for; the same ones always give the same workload. Raises `UsageError`."""
    texts, digest = read_corpus(corpus)
    random = np.random.Generator(np.random.PCG64(seed))
    if load.trace:
        return _replay(load, texts, digest, random)
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
    unique_from = 0 if load.inputs == "unique" else len(groups)
    if load.inputs == "zipf":
        order = _zipf(load, len(groups), random)
        groups = groups + groups
    empty = np.zeros(0, np.uint64)
    if load.mode == "closed":
        return Workload(groups, order, empty, empty, unique_from, digest)
    schedule = arrivals(load, load.timeline, random)
    warmup = arrivals(load, _warmup(load, load.timeline[0].rate), random)
    return Workload(groups, order, schedule, warmup, unique_from, digest)


def arrivals(load: Load, stages: Sequence[Stage], random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """Times of an open loop over `stages`, nanoseconds, ascending: Poisson or evenly spaced at the rate of each."""
    parts, begun = [np.zeros(0)], 0.0
    for stage in stages:
        parts.append(begun + _arrivals(load.arrivals, stage.rate or 0.0, stage.duration_s, random))
        begun += stage.duration_s
    return np.round(np.concatenate(parts) * 1e9).astype(np.uint64)


def _arrivals(kind: str, rate: float, seconds: float, random: np.random.Generator) -> npt.NDArray[np.float64]:
    if not rate:
        return np.zeros(0)
    if kind == "constant":
        return np.arange(int(np.floor(seconds * rate + 1e-9))) / rate
    expected = seconds * rate
    times = np.cumsum(random.exponential(1 / rate, int(expected + 10 * np.sqrt(expected) + 20)))
    return times[times < seconds]


def _warmup(load: Load, rate: float | None) -> list[Stage]:
    # The warm-up may overrun by a window; were its schedule to end first, the measurement would begin with a rested server.
    seconds = load.warmup_s + 2 * load.window_s + 5
    return [Stage(duration_s=seconds, rate=rate)] if load.warmup_s else []


def _zipf(load: Load, groups: int, random: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Order in which the k-th most popular input comes with a chance of 1 / k**zipf_s, and 1 - zipf_share of all are made unique."""
    weights = 1 / np.arange(1, groups + 1) ** load.zipf_s
    order = random.choice(groups, ORDER_LENGTH, p=weights / weights.sum()).astype(np.uint32)
    fresh = random.random(ORDER_LENGTH) >= load.zipf_share
    order[fresh] = groups + random.integers(0, groups, int(fresh.sum()), dtype=np.uint32)
    return order


def _replay(load: Load, texts: list[str], digest: str, random: np.random.Generator) -> Workload:
    """A trace: its times, its inputs in its order, as they are. The warm-up repeats them from the start at the trace's mean rate."""
    try:
        sent = [one for one in traces.read(str(load.trace)) if one.at_s < load.duration_s]
    except ValueError as error:
        raise UsageError(str(error), 'a trace has lines like {"at_s": 0.25, "input": "text"}') from None
    if not sent:
        raise UsageError(f"the trace sends nothing in its first {load.duration_s:g} s", "give a longer duration_s")
    words = " ".join(texts).split()
    groups = [list(one.inputs) or [_words(words, one.tokens or 1, random)] for one in sent]
    schedule = np.round(np.array([one.at_s for one in sent]) * 1e9).astype(np.uint64)
    warmup = arrivals(load, _warmup(load, len(sent) / load.duration_s), random)
    whole = hashlib.sha256(digest.encode() + json.dumps(groups).encode()).hexdigest()
    return Workload(groups, np.arange(len(groups), dtype=np.uint32), schedule, warmup, len(groups), whole)


def _words(words: list[str], tokens: int, random: np.random.Generator) -> str:
    """A text of about `tokens` tokens out of the corpus: English has about 1.3 tokens a word, and two mark the ends."""
    count = max(1, round((tokens - 2) / 1.3))
    start = int(random.integers(0, len(words)))
    return " ".join(words[(start + i) % len(words)] for i in range(count))


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
        except (ValueError, RecursionError, KeyError, TypeError):
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
