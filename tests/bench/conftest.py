"""Make the modules of this folder importable, and provide the server of answering.py and the outputs of a model."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.bench.measure import quality
from inferctl.models import model as models

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "harness"))


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts the test server with the given options and returns its URL.

    The server ends with the test.
    """
    with contextlib.ExitStack() as stack:
        from bench_samples import ANSWERING

        def start(*options: str) -> str:
            announce = tmp_path / f"announce-{time.monotonic_ns()}.json"
            process = subprocess.Popen([sys.executable, str(ANSWERING), "--announce", str(announce), *options])
            stack.callback(process.wait)
            stack.callback(process.kill)
            while not announce.is_file():
                assert process.poll() is None, "the answering server did not start"
                time.sleep(0.02)
            return str(json.loads(announce.read_text())["url"])

        yield start


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, str]]:
    """`weights("rerank")` makes the folder of a model of that task without weights, and returns it with its digest.

    Its fp32 outputs are those of the answering server without a drift.
    """
    from answering import probabilities, score, vector

    outputs: dict[str, Callable[[Any], Any]] = {
        "embed": lambda text: vector(text, 0),
        "rerank": lambda texts: [score(texts[0], text, 0) for text in texts[1:]],
        "classify": lambda text: probabilities(text, 0, ""),
    }
    classifier = '{"architectures": ["BertForSequenceClassification"], "num_labels": %d}'
    config = {"embed": "{}", "rerank": classifier % 1, "classify": classifier % 3}

    def make(task: str) -> tuple[Path, str]:
        folder = tmp_path / "weights"
        folder.mkdir()
        (folder / "config.json").write_text(config[task])
        digest = models.ModelFolder(folder).digest

        def reference(model: Path, inputs: list[Any], *rest: Any) -> object:
            values = np.array([outputs[task](each) for each in inputs], np.float32)
            return quality.Reference(inputs, values)

        monkeypatch.setattr(quality, "reference", reference)
        return folder, digest

    return make
