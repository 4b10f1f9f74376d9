"""`inferctl embed` as a process: nothing is lost or changed by kills, a full disk, or another number of processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from inferctl.reading import embedding_config, space
from inferctl.receipts import receipt
from tests.processes import ServerProcess, free_port, inferctl, several, until

ROWS, RANGES = 3000, 30
# Its figures are invented.
SAMPLE = Path(__file__).parents[2] / "docs/examples/kubernetes/receipts/embed-l4.json"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of different lengths, some equal, and three bad rows."""
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    words = [f"word{number} " * (1 + number % 40) for number in range(ROWS // 2)] * 2
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(words)]
    lines[7], lines[1000], lines[2999] = "{", '{"id": 1000}', json.dumps({"id": 2999, "text": ""})
    file.write_text("\n".join(lines))
    return file


def arguments(corpus: Path, model: Path, output: Path, *more: str) -> list[str]:
    small = ["--range-rows", str(ROWS // RANGES), "--engine", "echo"]
    return ["embed", str(corpus), "--model", str(model), "--output", str(output), *small, *more]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("part-*") if file.suffix != ".json"}


def done(folder: Path) -> int:
    return len([*folder.glob("part-?????.json")])


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    inferctl(*arguments(corpus, minilm, folder), code=0)
    return folder


def test_all_rows_are_there_in_order_and_the_receipt_counts_them(undisturbed: Path, corpus: Path, minilm: Path) -> None:
    import pyarrow.parquet as pq

    found = [pq.read_table(file).column("id").to_pylist() for file in sorted(undisturbed.glob("*.parquet"))]
    assert len(found) == RANGES
    assert [id_ for ids in found for id_ in ids] == [id_ for id_ in range(ROWS) if id_ not in (7, 1000, 2999)]
    errors = [json.loads(line) for file in sorted(undisturbed.glob("*.errors.jsonl")) for line in file.open()]
    assert [(each["line"], each["id"], each["code"]) for each in errors] == [
        (8, None, "not_json"),
        (1001, 1000, "no_text"),
        (3000, 2999, "empty_input"),
    ]
    sealed = json.loads((undisturbed / "receipt.json").read_text())
    assert sealed["seal"] == receipt.seal_of(sealed)
    assert (sealed["rows"], sealed["errors"]) == (ROWS - 3, 3)
    found = space.read(minilm, embedding_config.read(minilm))["dense"]
    assert sealed["model"]["spaces"] == {"dense": found.described}


@pytest.mark.parametrize("how", ["the run", "the engine", "Ctrl-C"])
def test_kills_change_no_byte(how: str, corpus: Path, minilm: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "inferctl", *arguments(corpus, minilm, out)]
    codes = []
    for enough in (1, 4, 9):
        with log.open("w") as stream:
            process = subprocess.Popen(command, stderr=stream, stdout=stream, start_new_session=True)

        def reached(process: subprocess.Popen[bytes] = process, enough: int = enough) -> bool:
            return process.poll() is not None or (done(out) >= enough and "computing" in log.read_text())

        until(reached)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        engines = children.read_text().split() if process.poll() is None else []
        for pid in map(int, engines) if how == "the engine" else [process.pid]:
            with suppress(ProcessLookupError):  # it ended
                os.kill(pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        codes.append(code := process.wait(120))
        if code != 0 and how == "Ctrl-C":
            assert code == 130
            assert "repeat the command" in log.read_text() or done(out) == RANGES
            assert "Traceback" not in log.read_text()
    assert how == "the engine" or any(codes), "no kill came in time"
    inferctl(*arguments(corpus, minilm, out), code=0)
    assert shards(out) == shards(undisturbed)
    assert not list(out.glob(".*"))


def test_processes_share_a_folder(corpus: Path, minilm: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "inferctl", *arguments(corpus, minilm, tmp_path / "out")]
    running = [subprocess.Popen([*command, "--part", f"{part}/2"]) for part in range(2)]
    assert [process.wait(200) for process in running] == [0, 0]
    assert shards(tmp_path / "out") == shards(undisturbed)
    workers = {json.loads(file.read_text())["worker"] for file in (tmp_path / "out").glob("part-?????.json")}
    assert len(workers) == 2
    assert (tmp_path / "out" / "receipt.json").exists()


def test_a_full_disk_ends_it_without_a_partial_shard(corpus: Path, minilm: Path, tmp_path: Path) -> None:
    """A limit of the size of files fails as a full disk does, with another number."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3000, 3000))
    ended = inferctl(*arguments(corpus, minilm, tmp_path / "out"), code=3, preexec_fn=limit)
    assert "file too large" in ended.stderr
    assert not shards(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_another_run_in_the_folder_is_refused(corpus: Path, minilm: Path, undisturbed: Path, tmp_path: Path) -> None:
    same = [*arguments(corpus, minilm, undisturbed)]
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text().replace("word5 ", "word6 "))
    cases: list[tuple[list[str], str]] = [
        ([*same, "--dry-run", "--hardware", "t5"], "hardware 't5' not found"),
        ([*same, "--dtype", "float16"], "dtype was 'float32' and is 'float16'"),
        ([*same, "--precision", "bf16"], "precision was 'auto' and is 'bf16'"),
        ([*same, "--prompt", "query: "], "prompt was '' and is 'query: '"),
        (["embed", str(changed), *same[2:]], str(changed)),
        (["embed", str(changed), *same[1:]], "was 1 and is 2"),
        ([*same[:2], "--output", str(corpus.parent), *same[2:4], "--part", "2/2"], "--part '2/2'"),
    ]
    before = shards(undisturbed)
    for (_, named), ended in zip(cases, several([command for command, _ in cases]), strict=True):
        assert ended.returncode == 2, ended.stderr
        assert named in ended.stderr
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    assert several([["embed", str(copy), *same[2:]]])[0].returncode == 0  # the content is what counts
    assert shards(undisturbed) == before


def test_stdin_strict_and_a_dry_run(minilm: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", '{"text": "a"}\n{"text": "b"}\n{"x": 1}\n'
    command = arguments(Path("-"), minilm, out, "--format", "jsonl", "--json")
    strict = inferctl(*command, "--strict", input=lines, code=1)
    assert "stdin.jsonl:3" in json.loads(strict.stdout)["error"]["message"]
    for given in (lines, ""):
        found = json.loads(inferctl(*command, input=given, code=0).stdout)
        assert (found["receipt"]["rows"], found["receipt"]["errors"]) == (2, 1)
    assert "stdin" in inferctl(*command, input=lines * 2, code=2).stderr
    dry: list[Any] = [
        "embed",
        out / "stdin.jsonl",
        "--model",
        minilm,
        "--engine",
        "echo",
        "--dry-run",
        "--hardware",
        "t4",
    ]
    forecast = json.loads(inferctl(*dry, "--json", code=0).stdout)
    assert (forecast["rows"], forecast["sample"]["rows"], forecast["sample"]["tokens_mean"]) == (3, 2, 3)
    assert [(row["hardware"], row["outcome"]) for row in forecast["hardware"]] == [
        ("this machine", "measured"),
        ("t4", "estimated"),
    ]
    assert "estimated" in inferctl(*dry, code=0).stdout
    assert forecast["vectors"] == {"new_bytes": 3 * 8 * 4, "old_bytes": None, "old_rows": None}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bits"])
def test_a_plan_uses_the_rates_of_receipts_and_adds_the_old_vectors(
    dtype: str, minilm: Path, corpus: Path, undisturbed: Path
) -> None:
    old = json.loads((undisturbed / "receipt.json").read_text())
    dry = ["embed", str(corpus), "--model", str(minilm), "--engine", "echo", "--dry-run", "--hardware", "t4"]
    known = ["--receipt", str(undisturbed / "receipt.json"), "--receipt", str(SAMPLE)]
    found = json.loads(
        inferctl(*dry, *known, "--replaces", str(undisturbed / "receipt.json"), "--dtype", dtype, "--json").stdout
    )
    _, run, bench, _ = found["hardware"]
    tokens = found["rows"] * found["sample"]["tokens_mean"]
    assert run["outcome"] == f"measured: receipt {old['seal'][:8]}"
    assert run["hours"] * 3600 == pytest.approx(tokens / (old["tokens"] / old["machine_s"]))
    assert (bench["hardware"], bench["outcome"]) == ("l4", "invented: sample receipt d5b306e8")
    assert bench["hours"] * 3600 == pytest.approx(tokens / (240 * 250))  # requests/s within the SLO, tokens
    assert bench["usd"] == pytest.approx(bench["hours"] * bench["price"]["usd_per_hour"])
    # Vectors of the engine `echo` have 8 numbers.
    each = {"float32": 4 * 8, "float16": 2 * 8, "bits": 1}[dtype]
    assert found["vectors"] == {"new_bytes": ROWS * each, "old_bytes": old["bytes"], "old_rows": ROWS - 3}


def test_wrong_receipts_of_a_plan_are_refused(minilm: Path, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    sealed = json.loads((undisturbed / "receipt.json").read_text())
    (changed := tmp_path / "changed.json").write_text(json.dumps({**sealed, "machine_s": 1}))
    other = receipt.write(tmp_path / "other.json", {**sealed, "model": {**sealed["model"], "digest": "0" * 64}}).path
    same = ["embed", str(corpus), "--model", str(minilm)]
    cases = [
        ([*same, "--dry-run", "--receipt", str(changed)], "was altered"),
        ([*same, "--dry-run", "--receipt", str(other)], "another model"),
        ([*same, "--dry-run", "--receipt", str(corpus)], "as a receipt"),
        ([*same, "--dry-run", "--replaces", str(SAMPLE)], "is not a receipt of `inferctl embed`"),
        ([*same, "--output", str(tmp_path / "out"), "--replaces", str(changed)], "--dry-run"),
    ]
    for (_, message), ended in zip(cases, several([command for command, _ in cases]), strict=True):
        assert ended.returncode and message in ended.stderr, ended.stderr


def test_a_server_gives_the_same_rows_also_if_it_is_away_for_a_while(
    corpus: Path, minilm: Path, undisturbed: Path, tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    port = free_port()
    first = serve("--model", str(minilm), "--engine", "echo", "--port", str(port))
    command = ["embed", str(corpus), "--url", first.url, "--output", str(tmp_path / "out")]
    running = subprocess.Popen([sys.executable, "-m", "inferctl", *command, "--range-rows", str(ROWS // RANGES)])
    until(lambda: list(tmp_path.glob("out/part-*.json")))
    first.kill()
    serve("--model", str(minilm), "--engine", "echo", "--port", str(port))
    assert running.wait(100) == 0
    assert "dense vectors only" in inferctl(*command, "--outputs", "sparse", code=2).stderr
    assert _vectors(tmp_path / "out") == _vectors(undisturbed)


def _vectors(folder: Path) -> list[list[object]]:
    tables = [parquet.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    return [row for table in tables for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
