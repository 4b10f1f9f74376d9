"""`inferctl space` compares folders, servers and receipts, and its exit code says whether to embed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import ServerProcess, inferctl

POOLING = "1_Pooling/config.json"


@pytest.fixture(scope="module")
def sources(minilm: Path, minilm_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model, its server, a receipt that has its space, and the model with another pooling."""
    place = tmp_path_factory.mktemp("sources")
    shutil.copytree(minilm, changed := place / "changed")
    (changed / POOLING).unlink()  # a link of the copy may be the model's own file
    settings = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (changed / POOLING).write_text(json.dumps(settings))
    for name in ("unusable", "untokenized"):
        shutil.copytree(minilm, place / name, ignore=shutil.ignore_patterns("tokenizer.json"))
    (place / "unusable" / "tokenizer.json").write_text("{}")
    receipt, unnamed = place / "receipt.json", place / "old.json"
    receipt.write_text(json.dumps({"model": minilm_server.get("/info").json()["model"], "precision": {}}))
    unnamed.write_text(json.dumps({"model": {}}))
    (place / "words.txt").write_text("\n".join(f"text {number}" for number in range(20)))
    found = {"folder": minilm, "server": minilm_server.url, "changed": changed, "receipt": receipt, "unnamed": unnamed}
    found |= {name: place / name for name in ("unusable", "untokenized", "absent", "words.txt")}
    return {name: str(each) for name, each in found.items()}


@pytest.mark.parametrize(
    ("old", "new", "options", "verdict", "parts"),
    [
        ("folder", "receipt", [], "not needed", set()),
        ("receipt", "changed", ["--definition"], "not enough evidence", {"pooling"}),
        ("server", "server", [], "not needed", set()),
        ("server", "server", ["--least-kept", "100"], "not enough evidence", set()),
        ("server", "server", ["--texts", "words.txt"], "not enough evidence", set()),
        pytest.param("server", "changed", [], "re-embed", {"pooling"}, marks=pytest.mark.slow),
    ],
)
def test_verdicts(
    sources: dict[str, str], tmp_path: Path, old: str, new: str, options: list[str], verdict: str, parts: set[str]
) -> None:
    given = [sources.get(each, each) for each in (old, new, *options)]
    record, code = tmp_path / "record.json", {"not needed": 0, "re-embed": 1}.get(verdict, 4)
    if "receipt" in (old, new) and not options:
        given.append("--definition")  # the folder need not start
    document = json.loads(inferctl("space", "diff", *given, "--json", "--output", record, code=code).stdout)
    assert (document["verdict"], set(document["spaces"]["dense"]["differs"])) == (verdict, parts)
    measured = "receipt" not in (old, new)
    assert bool(document["measured"]) == measured
    if measured and new == "server":
        assert document["measured"]["cosine_min"] == pytest.approx(1, abs=1e-5)
    assert json.loads(record.read_text()) == document
    assert verdict in inferctl("space", "diff", *given, code=code).stdout if not measured else True


def test_ndcg_of_both_is_measured_on_a_judged_collection(sources: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("pytrec_eval")
    titles = [{"_id": str(number), "title": f"about {number}", "text": f"text of {number}"} for number in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in titles))
    done = inferctl("space", "diff", *[sources["server"]] * 2, "--retrieval", tmp_path, "--json", code=0)
    found = json.loads(done.stdout)["retrieval"]
    assert found["collection"]["weak"]
    assert found["ndcg_at_10"][0] == found["ndcg_at_10"][1] > 50
    assert found["difference"]["points"] == 0
    done = inferctl("space", "diff", sources["server"], sources["receipt"], "--retrieval", tmp_path)
    assert "nDCG@10 was not measured" in done.stdout


@pytest.mark.parametrize("source", ["unnamed", "absent", "words.txt", "untokenized"])
def test_what_names_no_space_is_an_error_with_a_hint(sources: dict[str, str], source: str) -> None:
    done = inferctl("space", "show", sources[source])
    assert done.returncode in (2, 3)
    assert "hint:" in done.stderr


def test_a_model_that_does_not_start_has_no_verdict(sources: dict[str, str]) -> None:
    done = inferctl("space", "diff", sources["server"], sources["unusable"], code=3)
    assert "did not start" in done.stderr


def test_the_name_of_a_folder_is_that_of_its_server(sources: dict[str, str]) -> None:
    shown = [inferctl("space", "show", sources[each], code=0).stdout for each in ("folder", "server", "receipt")]
    assert shown[0].startswith("dense_")
    assert len(set(shown)) == 1


def test_long_values_are_shown_where_they_differ(sources: dict[str, str], tmp_path: Path) -> None:
    document = json.loads(Path(sources["receipt"]).read_text())
    for name in "ab":
        document["model"]["spaces"]["dense"] = {"name": name, "definition": {"default_prompt": 60 * "x" + name}}
        (tmp_path / name).write_text(json.dumps(document))
    done = inferctl("space", "diff", tmp_path / "a", tmp_path / "b", "--definition", code=4)
    assert 'xa" -> …' in done.stdout
