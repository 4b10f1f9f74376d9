"""`inferctl render`: what it writes, and what it takes from the repository around the spec."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.image.from_spec import public_url
from tests.processes import execute

Render = Callable[..., tuple[int, str, str]]
SPEC = "name: m\nmodel: {source: org/m}\n"


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Render:
    """`render(...)` runs `inferctl render` in this process, and returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> tuple[int, str, str]:
        return cli.run(["render", *flags]), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("remote", "named"),
    [
        ("https://github.example/team/m.git", "https://github.example/team/m.git"),
        ("https://user:p@ss@host.example/x", "https://host.example/x"),
        ("https://host.example:8443/x?private_token=abc#y", "https://host.example:8443/x"),
        ("git@host.example:team/m.git", "https://host.example/team/m.git"),
        ("ssh://git@host.example:22/team/m", "https://host.example/team/m"),
        ("/srv/git/m", None),
        ("file:///srv/git/m", None),
        ("../m", None),
    ],
)
def test_a_remote_is_named_without_credentials_and_only_when_others_can_reach_it(
    remote: str, named: str | None
) -> None:
    assert public_url(remote) == named


def test_labels_and_age_of_the_image_are_those_of_the_commit(
    tmp_path: Path, render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inferctl.yaml").write_text(SPEC)
    monkeypatch.setenv("GIT_COMMITTER_DATE", "1700000000 +0000")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return execute("git", *identity, *arguments, cwd=tmp_path, code=0).stdout.strip()

    git("init", "--quiet")
    git("remote", "add", "origin", "https://user:secret@host.example/team/m")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    labels = json.loads(render("--json")[1])["labels"]
    assert labels["org.opencontainers.image.revision"] == git("rev-parse", "HEAD")
    assert labels["org.opencontainers.image.source"] == "https://host.example/team/m"
    assert "SOURCE_DATE_EPOCH=1700000000" in render("--output", "out")[2]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    assert "SOURCE_DATE_EPOCH=1600000000" in render("--output", "out")[2]
    (tmp_path / "inferctl.yaml").write_text(SPEC + "serve: {port: 9000}\n")
    labels = json.loads(render("--json")[1])["labels"]
    assert labels["org.opencontainers.image.revision"] == git("rev-parse", "HEAD") + "-dirty"


def test_a_folder_gets_everything_a_build_needs(tmp_path: Path, render: Render) -> None:
    (tmp_path / "inferctl.yaml").write_text(SPEC)
    today = int(time.time()) // 86_400 * 86_400
    code, out, err = render("--output", "out dir")
    assert code == 0, err
    assert all((tmp_path / path).exists() for path in out.splitlines())
    assert (tmp_path / "out dir" / "layers/server/opt/inferctl/server/inferctl/serve/__main__.py").is_file()
    assert f"docker buildx build --build-arg SOURCE_DATE_EPOCH={today} 'out dir'" in err
