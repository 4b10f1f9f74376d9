"""Tests the errors of common mistakes: message, hint and exit code. The golden files have the text."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from inferctl import cli
from tests.processes import inferctl

SPEC = "name: m\nmodel:\n  source: org/m\n"


def broken_model(folder: Path, *, weights: bytes | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def spec(text: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "inferctl.yaml").write_text(text)
        return ["check"]

    return prepare


def with_spec(*command: str, text: str = SPEC) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "inferctl.yaml").write_text(text)
        return list(command)

    return prepare


def bare(*command: str) -> Callable[[Path], list[str]]:
    return lambda _: list(command)


def lfs_pointer(folder: Path) -> list[str]:
    broken_model(
        folder / "model", weights=b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"
    )
    return ["serve", "--model", "./model"]


def pickled(folder: Path) -> list[str]:
    broken_model(folder / "model", weights=None)
    (folder / "model" / "pytorch_model.bin").write_bytes(b"")
    return ["serve", "--model", "./model"]


def with_plan(text: str, *command: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "plan.yaml").write_text(text)
        return ["bench", "--plan", "plan.yaml", *command]

    return prepare


CASES: dict[str, tuple[int, Callable[[Path], list[str]]]] = {
    "spec-missing": (2, bare("render")),
    "spec-is-a-folder": (2, bare("check", "--spec", ".")),
    "spec-empty": (2, spec("")),
    "spec-not-yaml": (2, spec("name: [m\n")),
    "spec-many-mistakes": (
        2,
        spec(
            "nmae: m\nmodel:\n  source: org/m\n  weights: baked\nserve:\n  precision: bf61\n  port: 123456\n"
            "hardware: [a100]\n"
        ),
    ),
    "spec-key-twice": (2, spec(SPEC + "name: n\n")),
    "base-unknown": (2, spec(SPEC + "image: {base: cuda12.9}\n")),
    "command-unknown": (2, bare("biuld")),
    "option-unknown": (2, bare("render", "--ouput", "x")),
    "catalog-entry-unknown": (2, bare("catalog", "hardware", "a100")),
    "init-with-a-name-that-is-not-valid": (2, bare("init", "--name", "A B", "new")),
    "init-over-a-spec": (2, with_spec("init")),
    "locks-incomplete": (2, with_spec("render", text=SPEC + "image: {locks: .}\n")),
    "value-escapes-the-dockerfile": (2, with_spec("render", "--base-image", "a/b; rm -rf /")),
    "model-folder-missing": (2, bare("serve", "--model", "./nowhere")),
    "revision-with-a-space": (2, spec(SPEC + "  revision: a b\n")),
    "pin-of-a-spec-that-is-not-valid": (2, with_spec("pin", "--spec", "inferctl.yaml", "--check", text="nme: m\n")),
    "model-not-in-the-hub-cache": (3, bare("serve", "--model", "org/absent")),
    "model-is-an-lfs-pointer": (2, lfs_pointer),
    "model-has-pickled-weights-only": (2, pickled),
    "plan-unknown": (2, bare("bench", "--model", "org/absent", "--plan", "precison")),
    "plan-without-configurations": (2, with_plan("name: mine\n", "--model", "org/absent")),
    "plan-with-keys-that-a-url-cannot-apply": (
        2,
        with_plan(
            "name: mine\nmatrix: {precision: [fp32], corpus: [short, mixed]}\n", "--url", "t4=http://127.0.0.1:9"
        ),
    ),
    "bench-url-without-a-name": (2, bare("bench", "--url", "localhost")),
    "verify-url-without-a-library": (2, bare("verify", "--url", "http://127.0.0.1:9")),
    "bench-url-not-answering": (3, bare("bench", "--url", "t4=http://127.0.0.1:9", "--plan", "quick")),
    "floating-revision-refused": (1, with_spec("build", "--dry-run", text=SPEC + "  weights: bake\n")),
    "tag-not-a-name": (2, with_spec("build", "--dry-run", "--no-verify", "--tag", "Bad Name")),
    "docker-down": (3, with_spec("build", "--no-verify")),
    "pull-without-docker": (3, bare("pull", "registry.example.com/ml/m:1")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_answered_with_an_error_a_hint_and_its_exit_code(
    name: str,
    tmp_path: Path,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, prepare = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = prepare(tmp_path)
    ended = cli.run(arguments)
    out, err = capsys.readouterr()
    assert ended == code, err
    assert "error: " in err
    assert "\nhint: " in err
    said = err.replace(str(tmp_path.resolve()), "FOLDER")
    # inferctl's own size changes with every line of it.
    said = re.sub(r"^(  server) +\d+\.\d [kM]B", r"\1 SIZE", said, flags=re.MULTILINE)
    golden(f"errors/{name}.txt", f"$ inferctl {' '.join(arguments)}\n{out}{said}exit {code}\n")


def test_a_taken_port_is_answered_with_what_to_do(minilm: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = inferctl("serve", "--model", minilm, "--port", port, code=3)
    assert f":{port}" in done.stderr
    assert "hint: " in done.stderr
