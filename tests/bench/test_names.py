"""Loads whose requests name several models or adapters: drawn by shares, sent, recorded and summarized by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import probabilities, ranking
from pydantic import ValidationError
from test_load_shapes import make_load

from inferctl import cli
from inferctl.bench.load import records
from inferctl.bench.plan import workload
from inferctl.core.errors import UsageError
from inferctl.receipts import receipt
from tests.http_servers import Handler, serving

TASKS: dict[str, Any] = {"dense": "embed", "order": "rerank", "spam": "classify"}


@pytest.mark.parametrize(
    ("names", "shares"),
    [
        ("uniform", {"dense": 1 / 3, "order": 1 / 3, "spam": 1 / 3}),
        ("zipf:2", {"dense": 36 / 49, "order": 9 / 49, "spam": 4 / 49}),
        ({"spam": 3, "dense": 1}, {"spam": 0.75, "dense": 0.25}),
        ({"order": 1}, {"order": 1}),
    ],
)
def test_names_are_drawn_by_their_shares_and_nothing_else_changes(
    names: str | dict[str, float], shares: dict[str, float]
) -> None:
    load = make_load(names=names, mode="open", rate=50).with_names(TASKS)
    work, again = (workload.draw(load, "short", 7) for _ in range(2))
    assert work.digest == again.digest != workload.draw(load, "short", 8).digest
    firsts = np.cumsum([0, *(len(part.groups) for part in work.mix.values())])
    found = np.histogram(work.order, firsts)[0] / len(work.order)
    assert dict(zip(work.mix, found, strict=True)) == pytest.approx(shares, abs=0.01)
    for name, part in work.mix.items():
        alone = workload.draw(make_load(task=TASKS[name], mode="open", rate=50), "short", 7)
        assert len(part.groups[0]) == (17 if TASKS[name] == "rerank" else 1)
        assert work.schedule_ns.tolist() == alone.schedule_ns.tolist() or TASKS[name] == "rerank"


def test_names_that_a_load_cannot_have_are_rejected() -> None:
    with pytest.raises(UsageError, match="no model or adapter 'other'") as error:
        make_load(names={"other": 1}).with_names(TASKS)
    assert "dense, order, spam" in str(error.value.hint)
    for names in ("zipf:x", {"a": 0}, {"": 1}, "dense"):
        with pytest.raises(ValidationError):
            make_load(names=names)


def test_each_request_is_sent_and_recorded_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[tuple[str, str, str]] = []  # model, path and the text with the number of the request

    class Server(Handler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self) -> None:
            models = [{"name": name, "task": task, "model": {"source": f"/x/{name}"}} for name, task in TASKS.items()]
            listed = [{"id": name, "task": task} for name, task in TASKS.items()] + [{"id": "alias", "root": "dense"}]
            pages: dict[str, Any] = {"/info": {"name": "all", "models": models}, "/v1/models": {"data": listed}}
            self.answer({} if self.path == "/info" and sent else pages.get(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.body())
            texts = [body["query"]] if self.path == "/v1/rerank" else body["input"]
            sent.append((body["model"], self.path, texts[0]))
            if self.path == "/v1/rerank":
                self.answer({"results": ranking(texts[0], body["documents"], 0, "")})
            elif self.path == "/classify":
                self.answer({"data": [{"index": 0, "probs": probabilities(texts[0], 0, "")}]})
            else:
                self.answer({"data": [{"index": 0, "embedding": [1.0]}]})

        def answer(self, value: dict[str, Any]) -> None:
            self.reply(200, json.dumps(value).encode())
            self.wfile.flush()

    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "{name: mix, corpus: short, load: {users: 2, duration_s: 1, warmup_s: 0, workers: 2, names: {order: 1}}}"
    )
    with serving(Server) as port:
        url = f"t=http://127.0.0.1:{port}"
        output = ["--output", str(tmp_path), "--report", str(tmp_path / "page.html")]
        # Other programs of the machine can make the result invalid (5).
        assert cli.run(["bench", "--plan", str(plan), "--url", url, "--names", "uniform", *output]) in (0, 5)
        text = capsys.readouterr().out
        for name in ("alias", "zipf:x"):
            assert cli.run(["bench", "--plan", str(plan), "--url", url, "--names", name, *output]) == 2
            assert f"no model or adapter '{name}'" in capsys.readouterr().err
    (folder,) = tmp_path.glob("mix-*")
    sealed = receipt.load(folder / "receipts" / "t.json")
    assert "/x/" not in sealed.path.read_text(), "a path of the user"
    assert {name: sealed.load["names"][name] for name in TASKS} == dict.fromkeys(TASKS, 1)
    rows = records.merge(folder / "runs" / "t-1")
    measured = rows[(rows["phase"] == records.MEASURED) & (rows["error"] == records.OK)]
    numbers = {text.split()[1]: name for name, _, text in sent if text.startswith(f"{sealed.runs[0]['serial']} ")}
    assert {str(row["index"]): [*TASKS][row["name"]] for row in measured} == numbers
    assert {path: model for model, path, _ in sent} == dict(
        zip(("/v1/embeddings", "/v1/rerank", "/classify"), TASKS, strict=True)
    )
    counts = Counter(numbers.values())
    found = {each["name"]: each for each in sealed.data["names"]}
    assert {name: found[name]["latency_ms"]["n"] for name in TASKS} == counts
    for key in ("requests", "requests_per_s", "texts_per_s"):
        assert sum(each[key] for each in found.values()) == pytest.approx(sealed.data["summary"][key], abs=0.01), key
    assert "names that requests use" in text and "Names that requests use" in (tmp_path / "page.html").read_text()
    assert sealed.quality["checked"] is False and "other names" in sealed.quality["reason"]
