"""Writes a model with a LoRA adapter in its weights, compared in fp32 with the adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.models import adapter_effect, convert, reference_process
from inferctl.models.adapter import Adapter
from inferctl.models.adapter_effect import Effect
from inferctl.models.convert import Progress
from inferctl.models.model import ModelFolder

# What a merged model was made of, in its folder.
ORIGIN = "merged.json"
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def merge(
    base: ModelFolder,
    adapter: Adapter,
    names: tuple[str, str],
    target: Path,
    progress: Progress,
    on_wait: Callable[[float], None] | None,
) -> dict[str, Any]:
    """Write the merged model to the new folder `target`, and return its origin.

    `names`: of the base and the adapter, as the user calls them. `on_wait`: see `reference_process.run`; without it,
    nothing is compared. Raises `UsageError` if the base is quantized, `InferctlError` if the merged model is not close
    to the adapter, and what `convert.run` raises. Then nothing has the name `target`.
    """
    origin: dict[str, Any] = {
        "base": names[0],
        "base_sha256": base.digest,
        "adapter": names[1],
        "adapter_sha256": adapter.digest,
    }
    with convert.new_folder(target, base.bytes, "merge") as partial:
        convert.run("inferctl.models.merging", "merge", base.path, partial, base.bytes, progress, str(adapter.path))
        if on_wait:
            formats = ModelFolder(partial).number_formats
            precision = _PRECISIONS[formats[f"{next(iter(adapter.layers))}.weight"]]
            origin["next_tokens"] = _compare(base, adapter, partial, precision, on_wait)
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return origin


def _compare(
    base: ModelFolder, adapter: Adapter, merged: Path, precision: str, on_wait: Callable[[float], None]
) -> dict[str, Any]:
    options, prompts = ["--task", "generate"], adapter_effect.PROMPTS
    expected = reference_process.run(base.path, prompts, [*options, "--adapter", str(adapter.path)], on_wait)
    found = adapter_effect.texts(reference_process.run(merged, prompts, options, on_wait)["texts"])
    effect = Effect.of(expected["texts"], expected["adapters"][0], adapter_effect.texts(expected["texts"]), found)
    if failure := effect.failure(precision):
        raise InferctlError(
            f"the adapter {failure} by the merged weights in {precision}: {adapter_effect.line(effect.document())}",
            "serve the adapter on its base: `model.adapters` in the spec",
        )
    return effect.document()
