"""Draw the requests of a run from a seed: bodies, their order and, for an open loop, the time of each request.

Everything is drawn before the run starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inferctl.bench.plan import prompts, tokens
from inferctl.bench.plan.shape import Load, Stage
from inferctl.core import assets
from inferctl.core.errors import UsageError, did_you_mean

ORDER_LENGTH = 65_536
# The load generator replaces this mark by a number that is unique per request (a cache-busting prefix). Without it, a
# server could respond from a cache instead of running its model.
PREFIX_MARK = "@SERIAL@"
_QUERY_WORDS = 12


@dataclass(frozen=True)
class Workload:
    """The inputs of all requests, drawn from `load`, `corpus` (its name or path) and `seed`.

    `groups` has the texts of each distinct request; for rerank, the query is the first. For generation, it has the
    start that all prompts share and the rest of the prompt, and `input_tokens` and `output_tokens` have the tokens
    requested for and from each prompt.
    The n-th request sends `groups[order[n % len(order)]]`. `schedule_ns` (nanoseconds after the start of the
    measurement) and `warmup_schedule_ns` belong to an open loop and are empty for a closed loop. Groups from index
    `unique_from` get a cache-busting prefix each time; earlier groups are sent unchanged. `approximate` is why prompts
    do not have exactly `input_tokens`; None if they do. `mix` has the workload of each name of the load, which is that
    of its task: `order` then numbers the groups of all names, one after the other.
    """

    load: Load
    corpus: str
    seed: int
    groups: list[list[str]]
    order: npt.NDArray[np.uint32]
    schedule_ns: npt.NDArray[np.uint64]
    warmup_schedule_ns: npt.NDArray[np.uint64]
    unique_from: int
    corpus_sha256: str
    input_tokens: Sequence[int] = ()
    output_tokens: Sequence[int] = ()
    approximate: str | None = None
    mix: Mapping[str, Workload] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 (hex) of texts, order and times. Equal digests mean equal work."""
        marks = self.unique_from == 0 if self.unique_from in (0, len(self.groups)) else self.unique_from
        requested: list[object] = [list(self.output_tokens)] if self.output_tokens else []
        if any(prompts := [self._prompt(number) for number in range(len(self.groups))]):
            requested.append(prompts)
        requested += [[name, part.digest] for name, part in self.mix.items()]
        total = hashlib.sha256(json.dumps([self.groups, marks, *requested]).encode())
        for part in (self.order, self.schedule_ns, self.warmup_schedule_ns):
            total.update(part.tobytes())
        return total.hexdigest()

    def bodies(self, body: Callable[..., Mapping[str, object]]) -> list[bytes]:
        """Return one JSON request body per group, each on one line.

        `body` makes a body from texts and, for generation, from the tokens of the output (`ServerConnection.body`).
        """
        marked = [
            self._marked(group) if number >= self.unique_from else group for number, group in enumerate(self.groups)
        ]
        if self.output_tokens:
            bodies = [body(group, tokens) for group, tokens in zip(marked, self.output_tokens, strict=True)]
        else:
            bodies = [body(group) for group in marked]
        return [json.dumps({**each, **self._prompt(number)}).encode() for number, each in enumerate(bodies)]

    def _prompt(self, number: int) -> dict[str, str]:
        """Return what the request of a group selects. The queries are spread evenly, so that their share is exact."""
        if self.load.task != "embed":
            return {}
        if self.load.prompt_name is not None:
            return {"prompt_name": self.load.prompt_name}
        if (share := self.load.query_share) is None:
            return {}
        return {"input_type": "query" if int((number + 1) * share) > int(number * share) else "document"}

    def _marked(self, group: list[str]) -> list[str]:
        """Return a group with the mark of the prefix. A unique query makes each of its pairs unique.

        In a prompt, it follows what all prompts share.
        """
        if self.load.task == "generate":
            return [f"{group[0]} {PREFIX_MARK}".strip(), group[1]]
        count = 1 if self.load.task == "rerank" else len(group)
        return [f"{PREFIX_MARK} {text}" for text in group[:count]] + group[count:]


def draw(load: Load, corpus: str, seed: int, tokenizer: tokens.Tokenizer | None = None) -> Workload:
    """Return the workload of `load`, `corpus` and `seed`; equal arguments give equal workloads. Raises `UsageError`.

    The tokens of prompts for generation are counted with `tokenizer`, else estimated. Names of a task get equal texts.
    """
    if isinstance(load.names, dict):
        return _draw_mix(load, load.names, corpus, seed, tokenizer)
    texts, digest = read_corpus(corpus)
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = prompts.Prompts([], [], [])
    if load.generation:
        drawn = prompts.draw(load.generation, texts, load.inputs == "unique", random, tokenizer)
    groups = drawn.groups or _groups(load, texts, random)
    order = random.integers(0, len(groups), ORDER_LENGTH, dtype=np.uint32)
    unique_from = 0 if load.inputs == "unique" else len(groups)
    if load.inputs == "zipf":
        order = _zipf(load, len(groups), random)
        groups = groups + groups
        longer = "those that do not repeat have two more numbers" if load.zipf_share < 1 else None
        drawn = prompts.Prompts(groups, drawn.input_tokens * 2, drawn.output_tokens * 2, drawn.approximate or longer)
    lengths = (drawn.input_tokens, drawn.output_tokens, drawn.approximate)
    empty = np.zeros(0, np.uint64)
    if load.mode == "closed":
        return Workload(load, corpus, seed, groups, order, empty, empty, unique_from, digest, *lengths)
    schedule = arrivals(load, load.timeline, random)
    warmup = arrivals(load, _warmup(load, load.timeline[0].rate), random)
    return Workload(load, corpus, seed, groups, order, schedule, warmup, unique_from, digest, *lengths)


def _draw_mix(
    load: Load, shares: Mapping[str, float], corpus: str, seed: int, tokenizer: tokens.Tokenizer | None
) -> Workload:
    """Return the workload of several names. Each request takes one, with a probability proportional to its share."""
    loads = {name: load.of_name(name).model_copy(update={"names": None}) for name in shares}
    drawn = {each.task: each for each in loads.values()}
    parts = {task: draw(each, corpus, seed, tokenizer) for task, each in drawn.items()}
    mix = {name: parts[each.task] for name, each in loads.items()}
    # The names have numbers of their own, so that texts and times are as without them.
    random = np.random.Generator(np.random.PCG64([seed, len(shares)]))
    weights = np.array([*shares.values()])
    picks = random.choice(len(shares), ORDER_LENGTH, p=weights / weights.sum())
    order, first = np.zeros(ORDER_LENGTH, np.uint32), 0
    for number, part in enumerate(mix.values()):
        order = np.where(picks == number, first + part.order, order).astype(np.uint32)
        first += len(part.groups)
    return replace(next(iter(mix.values())), load=load, order=order, mix=mix)


def _groups(load: Load, texts: Sequence[str], random: np.random.Generator) -> list[list[str]]:
    """Return the texts of each distinct request."""
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
    if load.task == "rerank":
        groups = [_with_query(group, number) for number, group in enumerate(groups)]
    return groups


def rerank_groups(texts: Sequence[str], documents: int) -> list[list[str]]:
    """Return rerank requests with this number of documents (or all texts, if there are fewer): query, documents.

    The query is the start of one of the documents, so that one document is relevant, as in a search.
    """
    size = min(documents, len(texts))
    groups = [list(texts[start : start + size]) for start in range(0, len(texts) - size + 1, size)]
    return [_with_query(group, number) for number, group in enumerate(groups)]


def _with_query(group: list[str], number: int) -> list[str]:
    relevant = group[number % len(group)]
    return [" ".join(relevant.split()[:_QUERY_WORDS]), *group]


def arrivals(load: Load, stages: Sequence[Stage], random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """Return the send times of an open loop over `stages`, in nanoseconds, ascending.

    The times form a Poisson process or are evenly spaced, at the rate of each stage.
    """
    parts, start_s = [np.zeros(0)], 0.0
    for stage in stages:
        parts.append(start_s + _arrivals(load.arrivals, stage.rate or 0.0, stage.duration_s, random))
        start_s += stage.duration_s
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
    # The warm-up can overrun by one window. If its schedule ended earlier, the server would be idle when the
    # measurement starts.
    seconds = load.warmup_s + 2 * load.window_s + 5
    return [Stage(duration_s=seconds, rate=rate)] if load.warmup_s else []


def _zipf(load: Load, groups: int, random: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Return an order in which the k-th most popular input has a probability proportional to 1 / k**zipf_s.

    A share of 1 - zipf_share of all requests has a unique input.
    """
    weights = 1 / np.arange(1, groups + 1) ** load.zipf_s
    order = random.choice(groups, ORDER_LENGTH, p=weights / weights.sum()).astype(np.uint32)
    unique = random.random(ORDER_LENGTH) >= load.zipf_share
    order[unique] = groups + random.integers(0, groups, int(unique.sum()), dtype=np.uint32)
    return order


def read_corpus(name: str) -> tuple[list[str], str]:
    """Return the texts of a corpus and the sha256 (hex) of its file.

    `name` is a corpus of benchmarks/corpora, or the path of a .jsonl or .txt file. Raises `UsageError`.
    """
    is_path = name.endswith((".jsonl", ".txt")) or "/" in name
    folder = assets.root() / "benchmarks" / "corpora"
    path = Path(name) if is_path else folder / f"{name}.jsonl"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.jsonl"))
        raise UsageError(
            f"corpus {name!r} not found",
            did_you_mean(name, known)
            or f"known corpora: {', '.join(known)}; or pass the path of a .jsonl or .txt file",
        )
    content = path.read_bytes()
    texts = []
    # splitlines() would also split at U+2028 and other separators, which JSON strings may contain.
    for number, line in enumerate(_decoded(path, content).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            texts.append(line if path.suffix == ".txt" else str(json.loads(line)["text"]))
        except (ValueError, RecursionError, KeyError, TypeError):
            raise UsageError(
                f'{path}:{number}: the line is not JSON like {{"text": "..."}}',
                "write one JSON object per line, or one text per line in a .txt file",
            ) from None
    if not texts:
        raise UsageError(f"the corpus {path} is empty", "write one text per line")
    return texts, hashlib.sha256(content).hexdigest()


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 ({error.reason})",
            "convert the file, for example with `iconv -f latin1 -t utf-8`",
        ) from None
