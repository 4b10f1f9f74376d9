"""What the first commands of a new user say and leave behind."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.config import settings
from inferctl.core.errors import NotReadyError
from inferctl.estimate import forecast
from inferctl.facts import catalog
from inferctl.image import locks
from tests.models.model_folders import stand_in
from tests.processes import python

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("base", list(catalog.bases()))
def test_what_init_writes_for_a_base_passes_check(here: Path, base: str, minilm: Path, capsys: Captured) -> None:
    model = stand_in(here / "llama") if base.startswith("vllm") else minilm
    assert cli.run(["init", "--base", base, "--model", str(model)]) == 0
    assert cli.run(["check"]) == 0, capsys.readouterr().out


def test_a_generative_model_gets_a_base_with_vllm(here: Path, minilm: Path, capsys: Captured) -> None:
    llama = stand_in(here / "llama")
    assert cli.run(["init", "--model", str(llama)]) == 0
    spec = (here / "inferctl.yaml").read_text()
    assert "base: vllm-cuda13.0 " in spec
    assert "slo:" not in spec
    assert cli.run(["check"]) == 0, capsys.readouterr().out
    for command in (["check"], ["render"], ["build", "--dry-run"]):
        capsys.readouterr()
        assert cli.run([*command, "--model", str(minilm)]) == 2
        told = capsys.readouterr()
        assert "vllm-cuda13.0" in told.out + told.err
    assert cli.run(["render", "--base", "cpu"]) == 2
    assert "hint: set image.base to one of vllm-cpu, vllm-cuda13.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["./nope", "nope", "~/nope", "org/sub/nope", "empty", "./gguf/", "gguf/m.gguf", "./gguf/m.gguf", "", "."]
)
def test_init_writes_no_spec_for_a_path_that_is_no_model(here: Path, capsys: Captured, source: str) -> None:
    for folder in ("empty", "gguf"):
        (here / folder).mkdir()
    (here / "gguf" / "m.gguf").touch()
    assert cli.run(["init", "--model", source]) == 2
    assert "hint: " in capsys.readouterr().err
    assert not (here / "inferctl.yaml").exists()


def test_init_keeps_an_existing_spec_unless_forced(here: Path, capsys: Captured) -> None:
    ci = ["--ci", "github", "--package", "inferctl @ file:///wheel.whl"]
    assert cli.run(["init", "--model", "org/first"]) == 0
    spec = here / "inferctl.yaml"
    # Nobody asked for an SLO, so the server accepts what fits its queue.
    assert settings.resolve(settings.read(spec), {}, {}).spec.slo.p99_ms is None
    assert cli.run(["init", "--model", "org/second"]) == 2
    assert "`--force`" in capsys.readouterr().err
    for flags in (ci, [*ci, "--force"]):
        assert cli.run(["init", "--model", "org/second", *flags]) == 0
        assert "org/first" in spec.read_text()
    assert cli.run(["init", "--force", "--model", "org/second"]) == 0
    assert "org/second" in spec.read_text()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("image: {locks: ./none}", "image.locks: server.txt not found in none"),
        ("image: {wheels: ./none}", "image.wheels: none has no wheels"),
        ("image: {locks: ./others}", "image.locks: "),
    ],
)
def test_check_reports_a_file_that_the_spec_names_and_that_is_absent(
    here: Path, setting: str, said: str, minilm: Path, capsys: Captured
) -> None:
    (here / "others").mkdir()
    for name in ("torch", "server"):
        header = locks.header("torch2.13-cpu", "3.11", "linux/amd64")
        (here / "others" / f"{name}.txt").write_text(f"{header}torch==2.13.0 --hash=sha256:{'0' * 64}\n")
    (here / "inferctl.yaml").write_text(f"name: m\nmodel: {{source: {minilm}}}\nhardware: [t4]\n{setting}\n")
    assert cli.run(["check", "--json"]) == 2
    errors = [one["what"] for one in json.loads(capsys.readouterr().out)["findings"] if one["level"] == "error"]
    assert len(errors) == 1
    assert said in errors[0].replace("./", "")


def test_a_dockerfile_of_someone_else_is_overwritten_only_with_force(here: Path, capsys: Captured) -> None:
    (here / "inferctl.yaml").write_text("name: m\nmodel: {source: org/m}\n")
    (here / "Dockerfile").write_text("FROM mine\n")
    assert cli.run(["render", "--output", "."]) == 2
    assert (here / "Dockerfile").read_text() == "FROM mine\n"
    assert not (here / "locks").exists()
    assert cli.run(["render", "--output", ".", "--force"]) == 0
    assert cli.run(["render", "--output", "."]) == 0


def test_an_estimate_without_the_bench_extra_says_what_to_install(here: Path, minilm: Path) -> None:
    arguments = ["estimate", "--model", str(minilm), "--hardware", "t4"]
    code = f"import sys; sys.modules['numpy'] = None; from inferctl import cli; sys.exit(cli.run({arguments!r}))"
    done = python("-c", code, code=3)
    assert "pip install '.[bench]'" in done.stderr


def test_a_lock_is_not_judged_without_a_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "2")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", "/nonexistent/cache")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    stack = catalog.stack("torch2.13-cu130")
    with pytest.raises(NotReadyError, match="cannot reach a package index"):
        locks.resolve(locks.LockTarget(stack, "3.12", "linux/amd64"), ())


def test_a_failure_with_format_json_prints_a_document(here: Path, capsys: Captured) -> None:
    for flags in (["--format", "json"], ["--format=json"]):
        assert cli.run(["compare", "a.json", "b.json", *flags]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("command", "whole"),
    [
        (
            "check",
            "      hint: run `inferctl pin` to write its digest into the spec, or set image.base_image to a mirror",
        ),
        ("catalog hardware", "a100-40gb-mig-3g.20gb  8.0   42   7.58  121   121    243   20   778"),
        (
            "estimate --model MODEL --hardware t4,l4 --slo-p99-ms 70",
            "can serve 4476 texts/s in requests of 1 (measured",
        ),
        (
            "deploy --explain -f DEPLOY",
            "  tokens per request                       250 tokens             spec deploy.traffic",
        ),
    ],
)
def test_a_pipe_gets_whole_lines_without_padding(
    here: Path, minilm: Path, command: str, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Before, tables had 80 columns also in a pipe: cells were split over lines, and lines were padded with spaces."""
    monkeypatch.delenv("COLUMNS")
    # A tenth of the requests that an estimate simulates.
    monkeypatch.setattr(forecast, "Scenario", functools.partial(forecast.Scenario, count=forecast.REQUESTS // 10))
    (here / "inferctl.yaml").write_text(f"name: m\nmodel: {{source: {minilm}}}\nhardware: [t4]\n")
    replaced = {"MODEL": minilm, "DEPLOY": ROOT / "docs" / "examples" / "kubernetes" / "embed.yaml"}
    cli.run([str(replaced.get(word, word)) for word in command.split()])
    told = capsys.readouterr()
    assert whole in told.out, told.err
    assert not [line for line in told.out.splitlines() if line.endswith(" ")]
