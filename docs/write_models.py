"""Writes docs/models.md: which published models are served and how, from the gate that each start of a server passes.

`make docs` runs it, and a test compares the result. Each model is a small folder of the same shape with random weights
(`tests/published_models.py`). Its engine is loaded with it on the CPU in fp32, which includes all checks of a start.

python docs/write_models.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferctl.models.model import ModelFolder

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "models.md"
_BEST = 30
_HEAD = """\
# Published models

`make docs` loads small folders of the same shape as published models, with random weights, and writes whether they are
served and how. The published files were not downloaded, and they change: check yours before you download the weights,
with `inferctl check --model ORG/NAME`. [serve.md](serve.md#choose-a-model) describes what is supported.
"""
_TITLES = {"embed": "Embedding models", "rerank": "Cross-encoders and other rerankers", "classify": "Classifiers"}
_COLUMNS = {"embed": "model (MMTEB)", "rerank": "model", "classify": "model"}


@dataclass(frozen=True)
class Verdict:
    """Whether models of one shape are served, and how, or why not."""

    served: bool
    how: str


def verdict(name: str, place: Path) -> Verdict:
    """Return the verdict about a published model. `place` is an empty folder for the small model."""
    from inferctl.core.errors import UsageError
    from inferctl.models import conversion, convert, model
    from inferctl.models.model import ModelFolder
    from inferctl.reading import model_summary
    from inferctl.serve.engine_process.engine_protocol import EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine
    from tests import published_models

    shape = published_models.PUBLISHED[name]
    folder = published_models.write(name, place / "model")
    steps = []
    try:
        if convert.needed(ModelFolder(folder)):
            (place / "new").mkdir()
            conversion.convert(folder, place / "new")
            folder = place / "new"
            steps.append("pickles, converted")
        found = model.find(str(folder))
        task = model.resolve_task(shape.task, found, name)
        if _implied(found, name) != task:
            steps.append(f"with `model.task: {task}`")
        summary = model_summary.read(task, folder)
        del summary["max_tokens"]  # of the small model
        summary.pop("prompts", None)  # not those of the published model
        steps.append(re.sub(r"dense \d+ to \d+", "dense", model_summary.line(summary)))
        engine = EngineConfig(model=str(folder), task=task, precision="fp32", device="cpu", max_batch_tokens=256)
        attention = EncoderEngine(engine).load().attention
        steps.append("" if attention == "none" else f"{attention} attention")
    except UsageError as error:
        return Verdict(False, error.message.replace(str(folder), "it").replace(name, "it"))
    return Verdict(True, ", ".join(step for step in steps if step))


def page() -> str:
    """Return the whole page."""
    from tests.published_models import SHAPES

    rows: dict[str, list[str]] = {task: [] for task in _TITLES}
    ranked: list[tuple[float, bool]] = []
    verdicts: list[Verdict] = []
    for shape in SHAPES:
        if shape.task not in rows:
            continue  # vLLM decides about generative models
        with tempfile.TemporaryDirectory() as place:
            found = verdict(next(iter(shape.scores)), Path(place))
        verdicts.append(found)
        ranked += [(score, found.served) for score in shape.scores.values() if score is not None]
        names = ", ".join(f"`{name}`" + (f" ({score})" if score else "") for name, score in shape.scores.items())
        how = found.how.replace("|", "\\|")
        rows[shape.task].append(f"| {names} | {'yes' if found.served else '**no**'} | {how} |\n")
    best = [served for _, served in sorted(ranked, reverse=True)[:_BEST]]
    parts = [
        _HEAD,
        f"Of the {len(best)} open models on this page with the best scores in MMTEB (in parentheses, in percent, 20 "
        f"August\n2026), {sum(best)} are served. Of the {len(verdicts)} shapes below, "
        f"{sum(each.served for each in verdicts)} are.\n",
    ]
    for task, title in _TITLES.items():
        parts.append(
            f"## {title}\n\n| {_COLUMNS[task]} | served | how, or why not |\n|---|---|---|\n{''.join(rows[task])}"
        )
    return "\n".join(parts)


def _implied(found: ModelFolder, name: str) -> str:
    """Return the task without `--task`; empty if there is none."""
    from inferctl.core.errors import UsageError
    from inferctl.models import model

    try:
        return model.resolve_task("auto", found, name)
    except UsageError:
        return ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET)
