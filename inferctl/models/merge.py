"""Writes a model with a LoRA adapter in its weights, compared in fp32 with the adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.models import adapter_effect, convert, reference_process
from inferctl.models.adapter import Adapter
from inferctl.models.adapter_effect import PROMPTS, Effect
from inferctl.models.convert import Progress
from inferctl.models.model import ModelFolder

# What a merged model was made of, in its folder.
ORIGIN = "merged.json"
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def merge(
    base: ModelFolder,
    adapter: Adapter,
    origin: dict[str, Any],
    target: Path,
    progress: Progress,
    on_wait: Callable[[float], None],
) -> ModelFolder:
    """Write the merged model to the new folder `target`, with `origin` and the figures of the comparison.

    `on_wait`: see `reference_process.run`. Raises `InferctlError` if the merged model is not close to the adapter, and
    what `convert` raises. Then nothing has the name `target`.
    """

    def check(merged: Path) -> None:
        format_ = ModelFolder(merged).number_formats[f"{next(iter(adapter.layers))}.weight"]
        expected = reference_process.run(base.path, PROMPTS, ["--adapter", str(adapter.path)], on_wait)
        found = reference_process.run(merged, PROMPTS, [], on_wait)
        plain = adapter_effect.texts(expected["texts"])
        effect = Effect.of(expected["texts"], expected["adapters"][0], plain, adapter_effect.texts(found["texts"]))
        origin["next_tokens"] = figures = effect.document()
        if failure := effect.failure(_PRECISIONS[format_]):
            what = f"the adapter {failure} by the merged weights in {format_}: {adapter_effect.line(figures)}"
            raise InferctlError(what, "serve the adapter on its base: `model.adapters` in the spec")
        (merged / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")

    return convert.convert(base.path, target, progress, adapter.path, check)
