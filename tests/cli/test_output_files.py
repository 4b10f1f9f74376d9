"""Files that a command writes: a place that cannot be written is an error before the work, not after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.core import outputs
from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.models import image_source
from inferctl.tenancy.metering import outbox

Captured = pytest.CaptureFixture[str]
ANNOUNCEMENT = '{"url": "http://127.0.0.1:1", "pid": 1}'
SPEC = "name: m\nmodel: {source: org/m}\n"
# Each would take long, or fail for another reason, if the place were not looked at first.
FILES = {
    "serve": "serve --model ./absent --announce {}",
    "serve-image": "serve --image nobody/absent:1 --announce {}",
    "bench-report": "bench --url a=http://127.0.0.1:9 --report {}",
    "compare": "compare A B --output {}",
}
ONE = Path(__file__).parents[2] / "docs" / "examples" / "kubernetes" / "one.yaml"
FOLDERS = {
    "lock": "lock --output {}",
    "render": "render --output {}",
    "init": "init {} --force",
    "deploy": f"deploy -f {ONE} --output {{}}",
}


@pytest.fixture(autouse=True)
def _folder_with_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    (tmp_path / "inferctl.yaml").write_text(SPEC)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")


def refusal(command: str, place: str, capsys: Captured) -> str:
    assert cli.run(command.format(place).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {place}" in err, err
    assert " cannot be written: " in err
    assert "\nhint: name " in err
    return err


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
@pytest.mark.parametrize("place", ["/proc/x", "file/x", ".", "n" * 300, "loop/x"])
def test_a_file_that_cannot_be_written_is_an_error_before_the_work(
    command: str, place: str, capsys: Captured, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    refusal(command, place, capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("place", ["/proc/x", "file", "file/x"])
def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(
    command: str, place: str, capsys: Captured
) -> None:
    refusal(command, place, capsys)


def test_the_check_leaves_a_file_and_its_folder_as_they_are(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    outputs.check(kept, "--output")
    outputs.check(tmp_path / "a" / "b" / "new.json", "--output", parents=True)
    outputs.check_folder(tmp_path / "c" / "d", "--output")
    assert kept.read_text() == "old"
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".inferctl-*"))


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_a_pipe_is_refused_and_stays(command: str, tmp_path: Path, capsys: Captured) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(command, "pipe", capsys)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("compare old.json new.json --output {}", "old.json"),
        ("compare old.json new.json --output {}", "new.json"),
        ("compare old.json new.json -o fresh.md --output {}", "link"),
        ("compare run run --output {}", "run/receipts/a.json"),
        ("bench --plan ./plan.yaml --report {}", "inferctl.yaml"),
        ("bench --plan ./plan.yaml --report {}", "plan.yaml"),
        ("bench --spec other.yaml --report {}", "other.yaml"),
        ("bench --corpus ./texts.jsonl --report {}", "texts.jsonl"),
        ("bench --model ./weights --report {}", "weights/config.json"),
    ],
)
def test_an_input_is_never_overwritten(command: str, place: str, tmp_path: Path, capsys: Captured) -> None:
    for name in ("old.json", "new.json", "run/receipts/a.json", "plan.yaml", "texts.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "weights").mkdir()
    for name in ("other.yaml", "weights/config.json"):
        (tmp_path / name).write_text(SPEC)
    (tmp_path / "link").symlink_to("old.json")
    before = (tmp_path / place).read_text()
    assert "it is an input of this command" in refusal(command, place, capsys)
    assert (tmp_path / place).read_text() == before


@pytest.mark.parametrize("command", [FILES["serve"], FILES["serve-image"]])
@pytest.mark.parametrize("place", ["inferctl.yaml", "notes.json", "link", "dangling"])
def test_only_an_announcement_is_removed_for_a_new_one(
    command: str, place: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "notes.json").write_text('{"url": "http://127.0.0.1:1"}')
    (tmp_path / "old.json").write_text(ANNOUNCEMENT)
    (tmp_path / "link").symlink_to("old.json")
    (tmp_path / "dangling").symlink_to("absent")
    before = {file: file.readlink() if file.is_symlink() else file.read_text() for file in tmp_path.iterdir()}
    refusal(command, place, capsys)
    after = {file: file.readlink() if file.is_symlink() else file.read_text() for file in tmp_path.iterdir()}
    assert after == before


def test_an_announcement_and_an_empty_file_such_as_mktemp_makes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    outputs.announce(tmp_path / "ready.json", "http://127.0.0.1:1")
    for name in ("empty.json", "ready.json"):
        outputs.retract(tmp_path / name)
        assert not (tmp_path / name).exists()


def _secret(folder: Path) -> None:
    with outputs.secret(folder / "file", "new", "--output", force=True):
        pass


# What writes a file of a fixed name into a folder that others may share.
WRITERS: dict[str, Callable[[Path], object]] = {
    "replace": lambda folder: outputs.replace(folder / "file", "new"),
    "announce": lambda folder: outputs.announce(folder / "file", "http://127.0.0.1:1"),
    "secret": _secret,
    "probe": lambda folder: outputs.check(folder / "absent", "--output"),
    "watermark": lambda folder: outbox.write_watermark(folder, 7),
    "instance": outbox.instance,
    "tag": lambda folder: image_source.remember("oci://r/m:1", "sha256:1", {"HF_HOME": str(folder)}),
}


@pytest.mark.parametrize("guessed", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link_of_another_user(
    writer: str, guessed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that are not random are known. Those that are random may be guessed."""
    folder, victim = tmp_path / "shared", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("of somebody")
    if guessed:
        monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    WRITERS[writer](folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    known = [".lock", f".inferctl-{os.getpid()}.partial", f".file.{os.getpid()}.partial", "watermark.new"]
    shutil.rmtree(folder)
    for path in [folder / "x", *written]:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in [*known, f".{path.name}.{'0' * 32}.partial"]:
            with contextlib.suppress(FileExistsError):
                (path.parent / name).symlink_to(victim)
    with contextlib.suppress(OSError, InferctlError):
        WRITERS[writer](folder)
        assert not any(path.is_symlink() for path in written if path.name != ".lock")
    assert victim.read_text() == "of somebody"


def test_a_disk_that_fills_up_later_is_an_error_of_the_machine() -> None:
    with pytest.raises(NotReadyError, match="/dev/full cannot be written: no space left on device"):
        outputs.write(Path("/dev/full"), "text", "--output")
    code = "import pathlib, inferctl.core.outputs as to; to.write(pathlib.Path('new'), 'text' * 1000, '--output')"
    assert subprocess.run(["sh", "-c", 'ulimit -f 1; exec "$0" -c "$1"', sys.executable, code], check=False).returncode
    assert not Path("new").exists()


def test_a_server_that_cannot_announce_itself_ends(minilm: Path, tmp_path: Path) -> None:
    """Whoever waits for the file would wait for ever."""
    folder = tmp_path / "ready"
    folder.mkdir()
    command = [sys.executable, "-m", "inferctl", "serve", "--model", str(minilm), "--engine", "echo", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--announce", str(folder / "ready.json")], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    # The place was fine when it was checked.
    remove_as_soon_as_checked(folder, process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "ready.json cannot be written" in err
    assert "Traceback" not in err


def remove_as_soon_as_checked(folder: Path, process: subprocess.Popen[str]) -> None:
    inside = folder / "ready.json"
    inside.write_text(ANNOUNCEMENT)
    while inside.exists():
        assert process.poll() is None
    folder.rmdir()
