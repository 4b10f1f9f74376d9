"""Which receipts belong together, and why some must not be compared: another machine, other work, another precision, or invalid by themselves."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inferctl.bench import receipt
from inferctl.bench.receipt import Receipt
from inferctl.errors import UsageError

ALLOWABLE = ("precision", "hardware")
# What lies between two runs of a repeat beside other runs: starts of servers, warm-up, the quality check of the first repeat.
_BETWEEN_S, _LONGER = 600.0, 3


@dataclass(frozen=True)
class Pair:
    """The receipts of one configuration; `new` None: it was not measured again."""

    old: Receipt
    new: Receipt | None

    @cached_property
    def together(self) -> bool:
        """Whether both were measured in one go, repeat by repeat."""
        if self.new is None:
            return False
        configurations = len(self.old.data["plan"].get("configurations") or ()) or 2
        return interleaved(self.old.data["runs"], self.new.data["runs"], configurations)

    @property
    def stretched(self) -> bool:
        """Whether both were measured in turns, but with more time between the runs of a repeat than `together` allows."""
        return (
            self.new is not None
            and not self.together
            and interleaved(self.old.data["runs"], self.new.data["runs"], None)
        )

    @property
    def same_texts(self) -> bool:
        """Whether the quality of both was checked with texts of one corpus: by its sha256, by its name where a receipt has none."""
        both = [one.data for one in (self.old, self.new) if one]
        digests = {one["quality"].get("corpus_sha256") for one in both}
        names = {(one["plan"].get("quality") or {}).get("corpus") for one in both}
        return len(names if None in digests else digests) == 1

    @property
    def name(self) -> str:
        return (
            self.old.name
            if self.new is None or self.new.name == self.old.name
            else f"{self.new.name} against {self.old.name}"
        )


def pairs(old: Path, new: Path) -> tuple[list[Pair], list[str]]:
    """Receipts of two files, or of two folders matched by configuration name; and notes on what has no counterpart in `old`.

    A folder is one that `inferctl bench` wrote, or its receipts/. Raises `UsageError`, or `InvalidRunError` for an altered receipt.
    """
    if old.is_file() and new.is_file():
        found = Pair(receipt.load(old), receipt.load(new))
        if found.new is not None and found.old.data["seal"] == found.new.data["seal"]:
            raise UsageError(f"{old} and {new} are the same receipt", "give the baseline's, then the candidate's")
        return [found], []
    if not (old.is_dir() and new.is_dir()):
        missing = next((path for path in (old, new) if not path.exists()), None)
        what = f"{missing} is not there" if missing else f"{old} and {new} are a file and a folder"
        raise UsageError(what, "give two receipts, or two folders that `inferctl bench` wrote")
    before, after = _folder(old), _folder(new)
    if not set(before) & set(after):
        raise UsageError(
            f"no configuration is in both ({', '.join(before)}; {', '.join(after)})",
            "give the two receipts themselves: they may have different names",
        )
    notes = [f"{name} is new: there is nothing to compare it with" for name in after if name not in before]
    return [Pair(one, after.get(name)) for name, one in before.items()], notes


def files(path: Path) -> list[Path]:
    """Return the receipts that `path` names: itself if it is no folder, else those in it."""
    if not path.is_dir():
        return [path]
    place = path / "receipts" if (path / "receipts").is_dir() else path
    return [file for file in sorted(place.glob("*.json")) if file.name != "result.json"]


def _folder(path: Path) -> dict[str, Receipt]:
    found = [receipt.load(file) for file in files(path)]
    if not found:
        raise UsageError(
            f"there are no receipts in {path}", "`inferctl bench` writes them into receipts/ of its folder"
        )
    named = {one.name: one for one in found}
    if len(named) < len(found):
        raise UsageError(f"two receipts in {path} have one configuration name", "keep one of each")
    return named


def refused(pair: Pair, allow: Sequence[str]) -> list[str]:
    """Why the pair cannot be compared; empty when it can."""
    if pair.new is None:
        return [f"{pair.old.name} was not measured again: there is no new receipt of that name"]
    old, new = pair.old.data, pair.new.data
    reasons = [
        f"the {side} receipt is invalid: {'; '.join(one['validity']['reasons'])}"
        for side, one in (("old", old), ("new", new))
        if not one["validity"]["valid"]
    ]
    if "hardware" not in allow:
        reasons += hardware(old, new)
    if schedule := _schedule(old, new):
        reasons.append(schedule)
    ran = [one["precision"].get("effective") or "not stated" for one in (old, new)]
    if ran[0] != ran[1] and "precision" not in allow:
        reasons.append(
            f"the effective precisions differ: {ran[0]} and {ran[1]} (--allow precision compares them as such)"
        )
    return reasons


def hardware(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what the hardware of two receipts differs."""
    reasons = []
    said = [
        " ".join(str(part) for part in (one["hardware"].get("name"), one["hardware"].get("key")) if part)
        for one in (old, new)
    ]
    if said[0] != said[1]:
        reasons.append(f"the hardware differs: {said[0]} and {said[1]}")
    here = [bool(one["configuration"].get("this_machine")) for one in (old, new)]
    if here[0] != here[1]:
        reasons.append("one server shared the load generator's machine, the other did not")
    cores = [one["environment"].get("cores") for one in (old, new)]
    if all(here) and None not in cores and cores[0] != cores[1]:
        reasons.append(f"the hardware differs: {cores[0]} and {cores[1]} cores")
    return reasons


def _schedule(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old.get("search") or new.get("search"):
        return "a search ends at a rate of its own: compare at one rate, as `inferctl bench --rate` measures it"
    loads = [
        {**(one["plan"].get("load") or {}), "neighbours": one["plan"].get("neighbours") or 0} for one in (old, new)
    ]
    for load in loads:
        # Without a share of the capacity it means nothing, and older receipts do not have it.
        if not load.get("capacity_percent"):
            load.pop("capacity_s", None)
    changed = [key for key in dict.fromkeys([*loads[0], *loads[1]]) if loads[0].get(key) != loads[1].get(key)]
    if changed:
        said = ", ".join(f"{key} {loads[0].get(key)} and {loads[1].get(key)}" for key in changed)
        return f"the loads differ: {said}"
    before, after = _schedules(old), _schedules(new)
    if before.get(0) != after.get(0):
        return (
            "the schedules differ (texts, order or times: another corpus, another seed or another version of inferctl)"
        )
    other = [str(repeat + 1) for repeat in sorted(before.keys() & after.keys()) if before[repeat] != after[repeat]]
    if other:
        return (
            f"the schedules of repeat {', '.join(other)} differ: receipts of different versions of inferctl, "
            "or another seed"
        )
    return ""


def _schedules(data: Mapping[str, Any]) -> dict[int, str]:
    """Return the sha256 of texts, order and times, by repeat. An older receipt has one for all of its repeats."""
    whole = data["workload"]["sha256"]
    return {0: whole} | {run["repeat"]: (run.get("workload") or {}).get("sha256") or whole for run in data["runs"]}


def interleaved(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], configurations: int | None = 2
) -> bool:
    """Whether both were measured in turns in one go: two repeats or more, every repeat of both before the next repeat of either, and the
    two runs of a repeat one after the other, no further apart than a bench of so many `configurations` takes for it (None: however far)."""
    if not all(run.get("started") for run in (*old, *new)):
        return False
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for run in sorted((*old, *new), key=_started):
        blocks.setdefault(run["repeat"], []).append(run)
    repeats = [blocks[repeat] for repeat in sorted(blocks)]
    both = repeats[: min(len(old), len(new))]
    return (
        len(both) >= 2
        and all(_in_turn(block, configurations) for block in both)
        and all(_started(before[-1]) < _started(after[0]) for before, after in itertools.pairwise(repeats))
    )


def _in_turn(block: Sequence[Mapping[str, Any]], configurations: int | None) -> bool:
    """Whether a repeat is two runs of which one followed the other: neither beside it, nor on another day, as in a bench that was resumed."""
    lengths = [float(run["summary"].get("seconds") or 0) for run in block]
    most = math.inf if configurations is None else _BETWEEN_S + _LONGER * configurations * max(lengths)
    return len(block) == 2 and lengths[0] <= (_started(block[1]) - _started(block[0])).total_seconds() <= most


def _started(run: Mapping[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(run["started"])
