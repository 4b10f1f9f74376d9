"""Reads Kubernetes objects from YAML or JSON files, folders and text, with the line of every field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.core import document
from inferctl.core.errors import Problem, SpecError, UsageError
from inferctl.manifests.kubernetes import fields

_HINT = "name files with Kubernetes objects, such as the output of `kubectl kustomize`"
_SUFFIXES = (".yaml", ".yml", ".json")
# Files of kustomize. Their objects are instructions for a build, not objects of a cluster.
_KUSTOMIZE_GROUP = "kustomize.config.k8s.io/"
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
MAX_FILES = 10_000

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """A Kubernetes object and where it was read. `lines` maps paths in `data` to lines (from 1) of `file`.

    An object that was made in memory has no file ("") and no lines.
    """

    data: dict[str, Any]
    file: str = ""
    lines: Mapping[FieldPath, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.data.get("kind", ""))

    @property
    def api_version(self) -> str:
        return str(self.data.get("apiVersion", ""))

    @property
    def name(self) -> str:
        """`metadata.name`, else `metadata.generateName`; "" if the object has neither."""
        metadata = self.data.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        return str(metadata.get("name") or metadata.get("generateName") or "")

    @property
    def namespace(self) -> str:
        """`metadata.namespace`; "" if absent, which means the namespace that kubectl is told to use."""
        metadata = self.data.get("metadata")
        return str(metadata.get("namespace") or "") if isinstance(metadata, dict) else ""

    @property
    def labels(self) -> dict[str, str]:
        """`metadata.labels`, as text."""
        return fields.text_map(fields.mapping(self.data, "metadata", "labels"))

    def line(self, path: Sequence[str | int] = ()) -> int | None:
        """Return the line of `path`, or of its closest parent, or of the object. None without a file."""
        for end in range(len(path), -1, -1):
            if (line := self.lines.get(tuple(path[:end]))) is not None:
                return line
        return None


def read(paths: Sequence[Path], left_out: list[str] | None = None) -> list[Located]:
    """Return the objects of files and folders (with their subfolders), in stable order.

    Lists are replaced by their items. In a folder, files without any Kubernetes object are left out, and so are files
    of kustomize with the patches that they name: build those first. Adds the places of what is left out, other than
    these files of kustomize, to `left_out`. Raises `UsageError` and `SpecError`.
    """
    objects: list[Located] = []
    left_out = [] if left_out is None else left_out
    for path in paths:
        if path.is_dir():
            objects += _folder(path, left_out)
        else:
            objects += _objects(document.read_all(path, _HINT), left_out, required=True)
    return objects


def parse(text: str, file: str, left_out: list[str] | None = None) -> list[Located]:
    """Return the objects of YAML text, as `read` does. `file` names it in errors. Raises `SpecError`."""
    return _objects(document.parse_all(text, file, _HINT), [] if left_out is None else left_out, required=True)


def objects_of(each: document.Document) -> list[Located]:
    """Return the objects of one document: itself, or the items of a list. Raises `SpecError` if it is no object."""
    return _objects([each], [], required=True)


def kustomization(folder: Path) -> Path | None:
    """Return the file that tells kustomize how to build `folder`; None if there is none."""
    return next((folder / name for name in KUSTOMIZATIONS if (folder / name).is_file()), None)


def built_from(path: Path) -> Path | None:
    """Return the folder that kustomize builds if `path` is one with a kustomization, or is a kustomization; or None."""
    if path.name in KUSTOMIZATIONS and path.is_file():
        return path.parent
    return path if kustomization(path) else None


def _folder(folder: Path, left_out: list[str]) -> list[Located]:
    found_files = (f for f in folder.rglob("*") if f.suffix in _SUFFIXES or f.name in KUSTOMIZATIONS)
    files = sorted(file for file in found_files if file.is_file())
    if not files:
        raise UsageError(f"{folder} has no YAML files", _HINT)
    if len(files) > MAX_FILES:
        raise UsageError(f"{folder} has more than {MAX_FILES:,} YAML files", _HINT)
    patches: set[Path] = set()
    found: list[tuple[Path, list[Located], list[str]]] = []
    for file in files:
        try:
            documents = document.read_all(file, _HINT)
        except SpecError:
            # Templates of Helm and lists of values are YAML files too, and not objects.
            if "templates" in file.parts or not _claims_object(file):
                found.append((file, [], [str(file)]))
                continue
            raise
        patches |= {patch.resolve() for each in documents for patch in _patches(file, each.data)}
        places: list[str] = []
        found.append((file, _objects(documents, places, required=False), places))
    kept = [each for each in found if each[0].resolve() not in patches]
    left_out += [place for file, _, places in kept if file.name not in KUSTOMIZATIONS for place in places]
    return [each for _, objects, _ in kept for each in objects]


def _claims_object(file: Path) -> bool:
    """Return whether a file that is not valid YAML has the first words of a Kubernetes object."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return "apiVersion:" in text and "kind:" in text


def _patches(file: Path, data: dict[str, Any]) -> Iterator[Path]:
    """Yield the files that a kustomization applies as patches."""
    if not str(data.get("apiVersion", "")).startswith(_KUSTOMIZE_GROUP) and file.name not in KUSTOMIZATIONS:
        return
    for key in ("patches", "patchesStrategicMerge", "patchesJson6902"):
        for each in data.get(key) or () if isinstance(data.get(key), list) else ():
            name = each.get("path") if isinstance(each, dict) else each
            if isinstance(name, str) and "\n" not in name:
                yield file.parent / name


def _objects(documents: Sequence[document.Document], left_out: list[str], *, required: bool) -> list[Located]:
    """Return the objects of `documents`. `required`: whether a document that is no object is an error.

    Adds the places of other documents, and of items of lists that are no objects, to `left_out`.
    """
    objects, problems = [], []
    for each in documents:
        kind, version = each.data.get("kind"), each.data.get("apiVersion")
        if not (isinstance(kind, str) and isinstance(version, str)):
            problems.append(
                Problem("kind", "not a Kubernetes object: no apiVersion or kind", each.lines.get(()), _HINT)
            )
            left_out.append(_place(each, ()))
        elif not version.startswith(_KUSTOMIZE_GROUP):
            objects += _items(each, kind, left_out)
    if required and problems:
        raise SpecError(documents[0].file, problems)
    return objects


def _place(each: document.Document, path: FieldPath) -> str:
    line = each.lines.get(path)
    return f"{each.file}:{line}" if line else each.file


def _items(each: document.Document, kind: str, left_out: list[str]) -> list[Located]:
    """Return the object of a document, or the items of a `List`, `PodList` and so on."""
    items = each.data.get("items")
    if kind == "List" and not isinstance(items, list):
        left_out.append(_place(each, ()))
        return []
    if not (kind.endswith("List") and isinstance(items, list)):
        return [Located(each.data, each.file, each.lines)]
    lines: dict[int, dict[FieldPath, int]] = {index: {} for index in range(len(items))}
    for path, line in each.lines.items():
        if len(path) >= 2 and path[0] == "items" and isinstance(path[1], int):
            lines[path[1]][path[2:]] = line
    left_out += [_place(each, ("items", index)) for index, item in enumerate(items) if not isinstance(item, dict)]
    # The items of a typed list, such as a PodList, may leave out their own kind.
    typed = {"apiVersion": each.data["apiVersion"], "kind": kind.removesuffix("List")} if kind != "List" else {}
    return [
        Located({**typed, **item}, each.file, lines[index])
        for index, item in enumerate(items)
        if isinstance(item, dict)
    ]
