"""Every number that a command takes has bounds: a typing error is an error at once, and never work without end."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from inferctl import cli
from inferctl.estimate import forecast
from inferctl.estimate.cost import Cost

Captured = pytest.CaptureFixture[str]
_BENCH = "bench --url a=http://127.0.0.1:9 --plan quick"
# Command line -> its options that take a number.
OPTIONS = {
    _BENCH: "--duration --users --rate --repeats --workers --slo --slo-ttft --slo-itl --dimensions",
    "bench --model ./absent --plan quick --precision fp32": "--batch-tokens",
    "bench --search --url a=http://127.0.0.1:9": "--slo",
    "estimate --config config.json": "--rate --slo-p99-ms --inputs --api-processes",
    "compare A B": "--floor-ms --floor-ndcg",
    "serve --model ./absent": "--port --max-batch-tokens --max-input-tokens --max-queue-tokens --max-context-tokens",
    "serve --model ./gone": "--hang-seconds --engines --max-sequences",
    "deploy --embed texts": "--parts",
    "embed a.jsonl --model ./absent -o out": "--max-batch-tokens --max-input-tokens --engines --range-rows",
    "embed b.jsonl --model ./absent -o out": "--range-bytes",
    "gateway --server 127.0.0.1:9": "--port --timeout --drain --metrics-port",
    "build --dry-run --model org/m": "--ready-timeout",
    "verify localhost:5000/a:b": "--ready-timeout",
}
# Numbers in text.
TEXTS = {
    "compare A B": "--threshold",
    "check --model org/m --hardware t4": "--driver",
    "estimate -m ./m": "--length",
    "serve --model ./absent": "--api-processes",
}
CASES = [(line, option) for line, options in OPTIONS.items() for option in options.split()]
# `--port 0` takes a free port, and `--drain 0` ends at once. The rest is a limit that may be 0.
ZERO_IS_FINE = {"--port", "--drain", "--floor-ms", "--floor-ndcg"}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("line", "option"), CASES, ids=[f"{line.split()[0]}{option}" for line, option in CASES])
def test_a_number_out_of_bounds_is_an_error_that_names_the_bound(line: str, option: str, capsys: Captured) -> None:
    values = ["-1", "nan", "inf", "-inf", "1e400", "99999999999999999999", "1000000000000", "many", ""]
    values += [] if option in ZERO_IS_FINE else ["0"]
    for value in values:
        code = cli.run([*line.split(), f"{option}={value}"])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), (value, err)
        assert "\nhint: " in err, value
        said = err.splitlines()[0]
        assert any(words in said for words in ("must be", "unable to parse")), (value, said)
        name = option.removeprefix("--")
        assert name.replace("-", "_") in said.replace("-", "_"), (value, said)


@pytest.mark.parametrize(("line", "option"), TEXTS.items())
def test_a_text_that_holds_a_number_is_checked(line: str, option: str, minilm: Path, capsys: Captured) -> None:
    Path("m").symlink_to(minilm)
    for value in ("0", "-1", "nan", "inf", "1e9", "1" * 400, "²", "1_000", "x", ""):
        assert cli.run([*line.split(), f"{option}={value}"]) == 2, value
        err = capsys.readouterr().err
        assert f"{option}" in err.splitlines()[0]
        assert "\nhint: " in err


def test_no_number_is_missing_in_the_table() -> None:
    listed = {(line.split()[0], option) for line, option in CASES}
    found = set()
    for command in get_command(cli.app).commands.values():  # type: ignore[attr-defined]  # the root is a group
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            annotation = parameter.annotation
            kinds = re.findall(r"\b(?:int|float)\b", str(get_args(annotation)[:1]))
            if kinds:
                # Typer keeps the first name of an option where its default goes.
                info = get_args(annotation)[1]
                named = [one for one in (info.default, *(info.param_decls or ())) if str(one).startswith("--")]
                found.add((command.name, named[0] if named else f"--{name.replace('_', '-')}"))
    assert found == listed


def test_the_largest_request_is_estimated_with_fewer_of_them() -> None:
    cost = Cost(0.001, 1e-6)
    few, many = (forecast.Scenario([128], inputs).server(cost).requests for inputs in (1, 2048))
    assert len(few) == forecast.REQUESTS
    assert len(many) * 2048 <= 1_100_000
    assert len(many) >= 200
