"""Pair the receipts of two benchmarks, and list the reasons why a pair cannot be compared."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from inferctl.core.errors import UsageError
from inferctl.receipts import receipt
from inferctl.receipts.receipt import JsonObject, Receipt

ALLOWABLE = ("precision", "hardware")


@dataclass(frozen=True)
class ReceiptPair:
    """The receipts of one configuration; `new` is None if the configuration was not measured again."""

    old: Receipt
    new: Receipt | None

    @cached_property
    def interleaved(self) -> bool:
        """Return whether both were measured in one benchmark, in alternating order."""
        return self.new is not None and runs_interleaved(self.old.runs, self.new.runs)

    @property
    def same_texts(self) -> bool:
        """Return whether both quality checks used the same corpus, by its sha256."""
        return len({side.quality.get("corpus_sha256") for side in (self.old, self.new) if side}) == 1

    @property
    def name(self) -> str:
        if self.new is None or self.new.name == self.old.name:
            return self.old.name
        return f"{self.new.name} against {self.old.name}"


def pairs(old: Path, new: Path) -> tuple[list[ReceiptPair], list[str]]:
    """Return the pairs of two receipts or of two folders, and a note for each configuration that is only in `new`.

    A folder is the output folder of `inferctl bench` or its receipts/. Its receipts are matched by configuration name.
    Raises `UsageError`, or `InvalidRunError` for an altered receipt.
    """
    if old.is_file() and new.is_file():
        return [ReceiptPair(receipt.load(old), receipt.load(new))], []
    if not (old.is_dir() and new.is_dir()):
        missing = next((path for path in (old, new) if not path.exists()), None)
        what = f"{missing} does not exist" if missing else f"{old} and {new} are not two files or two folders"
        raise UsageError(what, "give two receipts, or two output folders of `inferctl bench`")
    baselines, candidates = _by_name(old), _by_name(new)
    if not baselines.keys() & candidates.keys():
        raise UsageError(
            f"no configuration is in both folders ({', '.join(baselines)}; {', '.join(candidates)})",
            "give the paths of two receipts: their configurations may have different names",
        )
    notes = [f"{name} is only in NEW and is not compared" for name in candidates if name not in baselines]
    return [ReceiptPair(baseline, candidates.get(name)) for name, baseline in baselines.items()], notes


def files(path: Path) -> list[Path]:
    """Return the files of the receipts at `path`: `path` itself, or the receipts in this folder."""
    if not path.is_dir():
        return [path]
    folder = path / "receipts" if (path / "receipts").is_dir() else path
    return [file for file in sorted(folder.glob("*.json")) if file.name != "result.json"]


def _by_name(folder: Path) -> dict[str, Receipt]:
    """Return the receipts in a folder by configuration name."""
    loaded = [receipt.load(file) for file in files(folder)]
    if not loaded:
        raise UsageError(
            f"no receipts found in {folder}", "`inferctl bench` writes them into receipts/ of its output folder"
        )
    named = {sealed.name: sealed for sealed in loaded}
    if len(named) < len(loaded):
        raise UsageError(f"two receipts in {folder} have the same configuration name", "remove one of them")
    return named


def invalid_because(pair: ReceiptPair, allow: Sequence[str]) -> list[str]:
    """Return the reasons why the pair cannot be compared. `allow` lists differences to accept, from `ALLOWABLE`."""
    if pair.new is None:
        return [f"{pair.old.name} was not measured again: NEW has no receipt with this name"]
    sides = (("old", pair.old), ("new", pair.new))
    reasons = [
        f"the {side} receipt is invalid: {'; '.join(found)}"
        for side, sealed in sides
        if (found := sealed.data["validity"]["reasons"])
    ]
    if "hardware" not in allow:
        reasons += hardware_differences(pair.old, pair.new)
    if difference := _schedule_difference(pair.old, pair.new):
        reasons.append(difference)
    precisions = [sealed.precision or "not stated" for _, sealed in sides]
    if precisions[0] != precisions[1] and "precision" not in allow:
        reasons.append(f"the effective precisions differ: {precisions[0]} and {precisions[1]}")
    return reasons


def hardware_differences(old: Receipt, new: Receipt) -> list[str]:
    """Return how the hardware of two receipts differs, one sentence per difference."""
    reasons = []
    both = (old.data, new.data)
    devices = [
        " ".join(str(part) for part in (side["hardware"].get("name"), side["hardware"].get("key")) if part)
        for side in both
    ]
    if devices[0] != devices[1]:
        reasons.append(f"the hardware differs: {devices[0]} and {devices[1]}")
    local = [bool(side["configuration"].get("this_machine")) for side in both]
    if local[0] != local[1]:
        reasons.append("one server ran on the load generator's machine, the other did not")
    cores = [side["environment"].get("cores") for side in both]
    if all(local) and None not in cores and cores[0] != cores[1]:
        reasons.append(f"the hardware differs: {cores[0]} and {cores[1]} cores")
    return reasons


def _schedule_difference(old: Receipt, new: Receipt) -> str:
    """Return how loads or schedules differ, or an empty string."""
    if old.data.get("search") or new.data.get("search"):
        return "each search ends at its own rate: measure both at one rate with `inferctl bench --rate`"
    loads = [
        {**side.load, "task": side.task, "neighbours": side.data["plan"].get("neighbours") or 0} for side in (old, new)
    ]
    for load in loads:
        # It has no effect without a share of the capacity.
        if not load.get("capacity_percent"):
            load.pop("capacity_s", None)
        if requests := load.get("generation"):
            # Bounds of a good response do not change what is sent.
            load["generation"] = {**requests, "ttft_ms": None, "itl_ms": None}
    changed = [key for key in dict.fromkeys([*loads[0], *loads[1]]) if loads[0].get(key) != loads[1].get(key)]
    if changed:
        values = ", ".join(f"{key} {loads[0].get(key)} and {loads[1].get(key)}" for key in changed)
        return f"the loads differ: {values}"
    before, after = _schedules(old), _schedules(new)
    if before.get(0) != after.get(0):
        return "the schedules differ (texts, order or times): another corpus, seed or version of inferctl"
    if other := [str(repeat + 1) for repeat in sorted(before.keys() & after.keys()) if before[repeat] != after[repeat]]:
        return f"the schedules of repeat {', '.join(other)} differ: another version of inferctl or another seed"
    return ""


def _schedules(sealed: Receipt) -> dict[int, str]:
    """Return the sha256 of texts, order and times by repeat. An older receipt has one for all of its repeats."""
    whole = sealed.data["workload"]["sha256"]
    return {0: whole} | {run["repeat"]: (run.get("workload") or {}).get("sha256") or whole for run in sealed.runs}


def runs_interleaved(old: Sequence[JsonObject], new: Sequence[JsonObject]) -> bool:
    """Return whether the runs of two receipts alternate, as in one benchmark: both of a repeat before the next one.

    This takes two repeats or more, whose runs did not overlap.
    """
    if not all(run.get("started") for run in (*old, *new)):
        return False
    runs = sorted((*old, *new), key=_started)
    common = [run for run in runs if run["repeat"] < min(len(old), len(new))]
    apart = all(
        (_started(after) - _started(before)).total_seconds() >= float(before["summary"].get("seconds") or 0)
        for before, after in itertools.pairwise(common)
    )
    return len(common) >= 4 and apart and [run["repeat"] for run in runs] == sorted(run["repeat"] for run in runs)


def _started(run: JsonObject) -> datetime.datetime:
    return datetime.datetime.fromisoformat(run["started"])
