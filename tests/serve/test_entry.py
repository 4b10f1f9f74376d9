"""`python -m inferctl.serve`, which a container starts: its options and its dependencies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

import pytest
import typer.main

from inferctl import cli
from inferctl.image import render
from inferctl.image.locks import LEFT_OUT
from inferctl.serve import main
from tests.processes import ServerProcess, python

# Module names of the packages that an image omits, if they differ from the package names.
_MODULES = {
    "markdown-it-py": "markdown_it",
    "annotated-doc": "annotated_doc",
    "charset-normalizer": "charset_normalizer",
}
ABSENT = [_MODULES.get(name, name) for name in LEFT_OUT if name not in ("networkx", "setuptools")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server layer of an image as a folder, with a module that blocks imports of packages that the image omits."""
    folder = tmp_path_factory.mktemp("layer")
    for name, file in render.server_files().items():
        target = folder.joinpath(*PurePosixPath(name).parts[5:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        f"ABSENT = {ABSENT!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ABSENT:\n"
        "            raise ModuleNotFoundError(f'{name} is not in the image', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return folder


def test_it_serves_with_only_the_files_and_packages_of_an_image(image: Path, minilm: Path, tmp_path: Path) -> None:
    spec = tmp_path / "inferctl.yaml"
    spec.write_text("name: m\nmodel: {source: /model}\nserve: {host: 127.0.0.1, port: 1, precision: fp32}\n")
    flags = ("--spec", str(spec), "--model", str(minilm), "--port", "0", "--precision", "bf16", "--engine", "echo")
    server = ServerProcess.launch(tmp_path, "inferctl.serve", *flags, PYTHONPATH=str(image)).wait_announced()
    try:
        assert len(server.embed(model="m", input=["a", "b"]).json()["data"]) == 2
        assert server.get("/info").json()["name"] == "m"
    finally:
        assert server.stop() == 0, server.log.read_text()


def test_its_options_equal_those_of_inferctl_serve() -> None:
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    accepted = {name for action in main.parser()._actions for name in action.option_strings if name.startswith("--")}
    expected = {
        name for option in command.params for name in (*option.opts, *option.secondary_opts) if name[:2] == "--"
    }
    assert accepted - {"--help"} == expected - {"--image", "--help"}


def test_forwarded_options_arrive_unchanged_in_the_container() -> None:
    given = {
        "precision": "bf16",
        "allow_inaccurate": True,
        "name": "m",
        "aliases": "a,b",
        "max_batch_tokens": 64,
        "max_input_tokens": 32,
        "max_queue_tokens": 99,
        "max_context_tokens": 128,
        "max_sequences": 2,
        "kv_cache": "1GiB",
        "device": "cpu",
        "hang_seconds": 2.5,
        "log": "json",
        "engine": "echo",
        "engines": 1,
        "api_processes": "2",
        "truncate": False,
    }
    assert set(given) == set(main.FORWARDED)
    assert vars(main.parser().parse_args(main.arguments(given))) == given
    assert main.arguments({"port": 8000, "announce": Path("x")}) == ()


# Options of mistakes, and what is said.
MISTAKES: list[tuple[list[str], str]] = [
    (["--prescision", "bf16"], "unrecognized arguments: --prescision bf16"),
    (["serve"], "unrecognized arguments: serve"),
    (["--port", "many"], "invalid int value: 'many'"),
    (["--hang-seconds", "0"], "0 is less than 0.1"),
    (["--spec", "nowhere.yaml"], "spec file nowhere.yaml not found"),
    (["--model", "org/m", "--precision", "fp9"], "'fp9' is not one of"),
    (["--model", "./nowhere"], "model folder ./nowhere not found"),
]
_RUN_ALL = """
import sys
from inferctl.serve.main import exit_with, main
for command in [line.split() for line in sys.stdin]:
    try:
        exit_with(lambda: main(command))
    except SystemExit as end:
        print(f"exit code {end.code}", file=sys.stderr, flush=True)
"""


def test_invalid_options_are_errors_with_a_hint(image: Path) -> None:
    commands = "\n".join(" ".join(options) for options, _ in MISTAKES)
    done = python("-c", _RUN_ALL, input=commands, cwd=image, env={**os.environ, "PYTHONPATH": str(image)}, code=0)
    *parts, rest = done.stderr.split("exit code 2\n")
    assert (rest, done.stdout) == ("", "")
    for said, (_, message) in zip(parts, MISTAKES, strict=True):
        assert said.startswith("error: ")
        assert message in said
        assert "\nhint: " in said
