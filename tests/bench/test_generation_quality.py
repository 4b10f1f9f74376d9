"""The quality of a generation server: log-probabilities over HTTP, compared with the fp32 reference."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.bench import stats
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.measure.quality import QualityChecker, QualityResult
from inferctl.bench.plan.sections import Quality
from inferctl.models import model as models
from inferctl.serve.reference import reference
from tests import tiny_models
from tests.http_servers import Handler, serving

TOKENS = 300


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_generator(tmp_path_factory.mktemp("generator"))


class Server(Handler):
    """Answers with the 20 most likely tokens of the reference, moved by what `mode` says."""

    texts: dict[tuple[int, ...], dict[str, Any]]
    mode = ""

    def do_POST(self) -> None:
        body = json.loads(self.body())
        assert (body["prompt_logprobs"], body["max_tokens"]) == (20, 1)
        if self.mode.isdigit():
            self.send_error(int(self.mode))
            return
        text = self.texts[tuple(body["prompt"])]
        draw = random.Random(0)
        rows: list[Any] = [None]
        for position, token in enumerate(text["ids"][1:]):
            best = dict(zip(text["top_ids"][position][:20], text["top_logprobs"][position][:20], strict=True))
            best[token] = text["logprobs"][position]
            if self.mode == "drift":
                best = {key: min(0.0, value + draw.gauss(0, 2)) for key, value in best.items()}
            rows.append({key: {"logprob": math.nan if self.mode == "nan" else best[key]} for key in best})
        choice: dict[str, Any] = {"index": 0, "text": "x"}
        content = json.dumps({"choices": [choice if self.mode == "without" else choice | {"prompt_logprobs": rows}]})
        self.reply(200, content.encode())


@pytest.fixture(scope="module")
def target(generator: Path) -> Iterator[ServerConnection]:
    texts = [json.loads(line)["text"] for line in tiny_models.CORPUS.with_name("mixed.jsonl").read_text().splitlines()]
    Server.texts = {tuple(t["ids"]): t for t in reference(str(generator), texts, max_tokens=TOKENS)["texts"]}
    info = {"model": {"sha256": models.ModelFolder(generator).digest}}
    with serving(Server) as port:
        yield ServerConnection(f"http://127.0.0.1:{port}", "m", info, task="generate")


@pytest.fixture(scope="module")
def checker(generator: Path) -> QualityChecker:
    return QualityChecker(Quality(tokens=TOKENS), generator)


def check(checker: QualityChecker, target: ServerConnection, mode: str) -> QualityResult:
    Server.mode = mode
    return checker(target, lambda _: None)


def test_a_server_that_equals_fp32_has_no_divergence(checker: QualityChecker, target: ServerConnection) -> None:
    found = check(checker, target, "")
    assert (found.checked, found.passes, found.reason) == (True, True, None)
    assert found.kl and found.agreement and found.perplexity
    assert (found.kl["mean"], found.agreement["share"], found.agreement["interval"]) == (0, 1, (1, 1))
    assert found.perplexity["served"] == found.perplexity["fp32"] > 100
    assert found.texts == len(Server.texts)
    assert found.positions == sum(len(ids) - 1 for ids in Server.texts) > TOKENS - found.texts
    assert found.limits == {"kl": 0.1, "top_1": 0.8}


def test_another_distribution_fails_the_check(checker: QualityChecker, target: ServerConnection) -> None:
    found = check(checker, target, "drift")
    assert (found.checked, found.passes) == (True, False)
    assert found.kl and found.kl["mean"] > 0.1 and found.kl["p99"] > found.kl["mean"]
    assert found.kl["interval"] and found.kl["interval"][0] < found.kl["mean"] < found.kl["interval"][1]


@pytest.mark.parametrize(
    ("mode", "checked", "reason"),
    [
        ("without", False, "does not report log-probabilities of a prompt"),
        ("400", False, "no log-probabilities of a prompt: http://"),
        ("404", False, "/v1/completions returned 404"),
        ("500", True, "/v1/completions returned 500"),
        ("nan", True, "NaN"),
    ],
)
def test_a_server_without_log_probabilities_is_not_measured_and_a_broken_one_fails(
    checker: QualityChecker, target: ServerConnection, mode: str, checked: bool, reason: str
) -> None:
    found = check(checker, target, mode)
    assert (found.checked, found.passes) == (checked, False if checked else None)
    assert reason in (found.reason or "")


def test_a_quantized_checkpoint_is_compared_with_its_original_weights(
    checker: QualityChecker, target: ServerConnection
) -> None:
    digests = {"sha256": "0" * 64, "original_sha256": target.info["model"]["sha256"]}
    assert check(checker, replace(target, info={"model": digests}), "").passes


def test_the_interval_of_a_ratio_covers_it_for_dependent_values_in_groups() -> None:
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        sizes = draw.integers(10, 80, size=30)
        shares = draw.beta(18, 2, size=30)  # the values of a text depend on each other
        sums = draw.binomial(sizes, shares)
        half_width = stats.ratio_interval(sums.tolist(), sizes.tolist())
        assert half_width is not None
        covered += abs(sums.sum() / sizes.sum() - 0.9) <= half_width
    assert 0.91 <= covered / 400 <= 0.985
    assert stats.ratio_interval([1, 2], [2, 3]) is None
