"""docs/models.md says what the gate of the server says, and what is served equals its library."""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.serve.reference import library, reference
from tests.published_models import PUBLISHED, write

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
TEXTS = ["Which river flows through Vienna?", "SHOUTED naïve café", "机器学习", "a [SEP] b </s>", "word " * 300, ""]


def served() -> list[str]:
    """Return the first name of each model but rerankers that the page says is served, and needs no code of its own."""
    lines = [line for line in PAGE.read_text().splitlines() if " | yes | " in line]
    names = [re.findall("`(.*?)`", line)[0] for line in lines]
    return [
        name
        for name in names
        if PUBLISHED[name].task != "rerank"
        and not (PUBLISHED[name].pickled or "router_config.json" in PUBLISHED[name].files)
        and "auto_map" not in PUBLISHED[name].config
    ]


def _outputs(document: dict[str, Any], size: int) -> Iterator[Any]:
    """Yield the output of each text as one vector: the sparse weights of a vocabulary of `size`, or those of tokens."""
    for ids, weights in document.get("sparse", ()):
        vector = np.zeros(size, np.float32)
        vector[ids] = weights
        yield vector
    for encoded in document.get("token_vectors", ()):
        yield np.frombuffer(base64.b64decode(encoded), "<f4")


def test_the_page_is_what_the_script_writes() -> None:
    located = importlib.util.spec_from_file_location("write_models", ROOT / "docs" / "write_models.py")
    assert located and located.loader
    module = sys.modules["write_models"] = importlib.util.module_from_spec(located)
    located.loader.exec_module(module)
    assert module.page() == PAGE.read_text(), "run `make docs`"


@pytest.mark.parametrize("name", served())
def test_what_is_served_equals_its_library_from_raw_text(name: str, tmp_path: Path) -> None:
    folder, task = write(name, tmp_path / "model"), PUBLISHED[name].task
    compute = library(folder, task)
    document = reference(str(folder), TEXTS, task=task)
    if task == "classify":
        found, expected = document["scores"], np.stack([compute(text) for text in TEXTS])
    elif "embeddings" not in document:
        expected = np.concatenate([compute(text) for text in TEXTS])
        found = [np.concatenate(list(_outputs(document, len(compute(TEXTS[0])))))]
        expected = expected[None]
    else:
        expected = compute(TEXTS)
        found = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in document["embeddings"]]
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5 * float(np.abs(expected).max()) + 1e-6)
