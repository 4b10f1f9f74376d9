"""Faults for the rules of the lint: each is one change of good.yaml."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from inferctl.manifests.manifests_file import Located
from inferctl.manifests.versions import OLDEST_SUPPORTED

HERE = Path(__file__).parent
GOOD = HERE / "good.yaml"
FAULTS, SILENT = HERE / "faults.yaml", HERE / "silent.yaml"
_PREFIXES = {"at": (), "pod": ("spec", "template", "spec"), "server": ("spec", "template", "spec", "containers", 0)}


@dataclass(frozen=True)
class Fault:
    """One entry of faults.yaml, with the objects that have the fault."""

    rule: str
    what: str
    objects: list[dict[str, Any]]
    also: Sequence[str] = ()
    minor: int = OLDEST_SUPPORTED

    @property
    def name(self) -> str:
        return f"{self.rule}: {self.what}"


def good() -> list[dict[str, Any]]:
    """Return the objects of good.yaml, which the caller may change."""
    return copy.deepcopy(_good())


@cache
def _good() -> list[dict[str, Any]]:
    return [each for each in yaml.load_all(GOOD.read_text(encoding="utf-8"), yaml.CSafeLoader) if each]


def located(objects: Sequence[dict[str, Any]]) -> list[Located]:
    """Return objects as the lint reads them."""
    return [Located(each) for each in objects]


def faults() -> list[Fault]:
    """Return all faults of faults.yaml, each with its own copy of the objects."""
    entries = yaml.load(FAULTS.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return [
        Fault(
            entry["rule"],
            entry["fault"],
            _changed(entry),
            entry.get("also", ()),
            entry.get("minor", OLDEST_SUPPORTED),
        )
        for entry in entries
    ]


@cache
def silent() -> dict[str, list[dict[str, Any]]]:
    """Return the objects of each entry of silent.yaml, by what it says."""
    return {each["silent"]: _changed(each) for each in yaml.safe_load(SILENT.read_text(encoding="utf-8"))}


def _changed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    objects = {f"{each['kind']}/{each['metadata']['name']}": each for each in good()}
    for edit in entry.get("edits", ()):
        (place,) = _PREFIXES.keys() & edit.keys()
        path = [*_PREFIXES[place], *(_part(part) for part in edit[place].split("/"))]
        parent: Any = objects[edit["in"]]
        for part in path[:-1]:
            if isinstance(parent, dict) and part not in parent:
                parent[part] = {}
            parent = parent[part]
        if edit.get("remove"):
            del parent[path[-1]]
        else:
            parent[path[-1]] = copy.deepcopy(edit["set"])
    for name in entry.get("drop", ()):
        del objects[name]
    return [*objects.values(), *entry.get("add", ())]


def _part(part: str) -> str | int:
    return int(part) if part.isdigit() else part.replace("~1", "/")
