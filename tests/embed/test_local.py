"""A range becomes the same bytes whatever happens to engines, and inputs that cannot be computed get errors."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from inferctl.config.spec import Spec, Task
from inferctl.core.errors import InferctlError
from inferctl.embed.computer import Progress, compute
from inferctl.embed.local import LocalComputer, LocalOptions
from inferctl.models import model
from inferctl.serve.engines import echo
from tests import engines, tiny_models
from tests.processes import ServerProcess
from tests.tiny_models import CORPUS

WORDS = " ".join(json.loads(line)["text"] for line in CORPUS.read_text().splitlines()).split()
TEXTS = [" ".join(WORDS[at : at + 1 + at % 90]) for at in range(400)] + ["twice", "twice"]
FAULTS = {"nan": echo.NON_FINITE_TOKEN, "fails": echo.FAILING_TOKEN, "crashes": echo.CRASHING_TOKEN}
FAULTS["large"] = echo.LARGE_TOKEN  # out of memory, but not in isolation


@asynccontextmanager
async def local(folder: Path, task: Task = "embed", precision: str = "fp32", **options: Any) -> AsyncIterator[Any]:
    """A started computer with the model in `folder`."""
    spec = Spec.model_validate({"name": "m", "model": {"source": str(folder)}, "serve": {"precision": precision}})
    computer = LocalComputer(spec, task, model.find(str(folder)), LocalOptions(**options))
    try:
        await computer.start()
        yield computer
    finally:
        await computer.close()


@pytest.mark.xdist_group("minilm")
async def test_a_range_becomes_the_same_bytes_after_a_crash_and_with_two_engines(
    minilm: Path, minilm_server: ServerProcess
) -> None:
    progress = Progress()
    async with local(minilm, precision="auto") as one, local(minilm, precision="auto", engines=2) as two:
        first = await compute(one, TEXTS, Progress())
        again = asyncio.create_task(compute(one, TEXTS, progress))
        while not progress.rows:
            await asyncio.sleep(0)
        one._pool.kill()
        found = [first, await again, *await asyncio.gather(*(compute(two, TEXTS, Progress()) for _ in range(2)))]
        assert one._pool.counts()["restarts"] == 1
        assert progress.rows == len(TEXTS)
    assert len({each.rows.tobytes() for each in found}) == 1
    assert (first.errors, first.distinct) == ({}, len(set(TEXTS)))
    answer = httpx.post(f"{minilm_server.url}/v1/embeddings", json={"input": TEXTS}, timeout=60).json()
    served = np.array([each["embedding"] for each in answer["data"]])
    assert np.sum(first.rows * served, axis=1).min() > 0.999
    assert int(first.tokens.sum()) == answer["usage"]["prompt_tokens"]


async def test_an_input_that_cannot_be_computed_gets_an_error(minilm: Path, tmp_path: Path) -> None:
    """The echo engine fails by the first token, so the tokenizer has no special tokens."""
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 5, **FAULTS}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    right = [f"a {'b ' * length}" for length in range(40)] + ["large"]
    cases = {
        "nan": "engine_failed",
        "fails": "engine_failed",
        "crashes": "engine_unavailable",
        "": "empty_input",
        " ": "empty_input",
        "a " * 300: "context_length_exceeded",
        "a \ud800": "invalid_text",
    }
    inputs = [*right[:20], *cases, *right[20:], *cases]
    async with local(folder, engine="echo") as computer:
        expected, progress = await compute(computer, right, Progress()), Progress()
        found = await compute(computer, inputs, progress)
        assert progress.rows == len(inputs)
    assert {inputs[at]: reason.partition(":")[0] for at, reason in found.errors.items()} == cases
    assert len(found.errors) == 2 * len(cases)
    assert found.rows.tobytes() == expected.rows.tobytes()
    assert found.tokens.sum() == expected.tokens.sum()


@pytest.mark.parametrize("task", ["sparse", "tokens", "rerank", "classify"])
async def test_each_task_computes_what_its_engine_does(task: Any, minilm: Path, splade: Path, tmp_path: Path) -> None:
    texts, options = [("a question", "an answer"), ("what", "something else")], {}
    if task in ("rerank", "classify"):
        folder = tiny_models.make_cross_encoder(tmp_path, "bert", num_labels=1 if task == "rerank" else 3)
    else:
        folder, options, texts = {"sparse": splade, "tokens": minilm}[task], {"outputs": (task,)}, ["one", "and more"]
        task = "embed"
    async with local(folder, task, **options) as computer:
        found = await compute(computer, texts, Progress())
        ids, marks = zip(*computer._encode(texts), strict=True)
    engine, _ = engines.loaded(folder, task=task)
    rows = computer._model.activation(engine.run(engines.batch(ids, marks)).rows)
    for one, other in zip(found.rows, rows, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


async def test_an_engine_that_cannot_start_says_why(minilm: Path) -> None:
    with pytest.raises(InferctlError, match="CUDA"):
        async with local(minilm, device="cuda:7"):
            pass
