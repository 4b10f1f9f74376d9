"""Changes modules in the processes of the GPU check. Python imports this file because its folder is on PYTHONPATH.

With GPU_CHECK_POISON, the engine replaces a token id once, so that a batch has one beyond the vocabulary. With
GPU_CHECK_STAND_IN, CPUs take the place of a GPU: its name says so in each result.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

_changes: dict[str, list[Callable[[Any], None]]] = {}
POISONED = 997  # the token id that is replaced


def after_import(name: str, change: Callable[[Any], None]) -> None:
    """Call `change(module)` when a module was imported."""
    _changes.setdefault(name, []).append(change)


class _Finder:
    """Finds modules as the other finders do, and calls their changes after they ran."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name not in _changes:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def changed(module: Any) -> None:
            run(module)
            for change in _changes.pop(name, []):
                change(module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


def _poison(encoder: Any) -> None:
    """Let one batch with the token id POISONED have an id beyond the vocabulary, if the file still exists."""
    prepare = encoder.EncoderEngine.prepare

    def poisoned(self: Any, batch: Any) -> Any:
        if POISONED in batch.tokens:
            with suppress(FileNotFoundError):
                Path(os.environ["GPU_CHECK_POISON"]).unlink()
                tokens = batch.tokens.copy()
                tokens[tokens == POISONED] = 10**6
                batch = replace(batch, tokens=tokens)
        return prepare(self, batch)

    encoder.EncoderEngine.prepare = poisoned


def _other_sitecustomize() -> None:
    """Import the file of the same name that this one hides."""
    for folder in sys.path:
        file = Path(folder, "sitecustomize.py")
        if file.is_file() and not file.samefile(__file__):
            spec = importlib.util.spec_from_file_location("other_sitecustomize", file)
            if spec and spec.loader:
                with suppress(ImportError):  # of a file that imports the next one itself, by its name
                    spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
if "GPU_CHECK_POISON" in os.environ:
    after_import("inferctl.serve.engines.encoder", _poison)
if os.environ.get("GPU_CHECK_STAND_IN") == "1":
    sys.path.append(str(Path(__file__).parent))
    import stand_in

    for _name, _change in stand_in.CHANGES.items():
        after_import(_name, _change)
_other_sitecustomize()
