"""A load whose records cannot be written ends at once, with the system's own error: not after minutes, and not as a
failure of the server."""

from __future__ import annotations

import errno
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import known_server
import pytest
from bench_samples import SHORT_PLAN
from test_load import measure

from inferctl import cli
from inferctl.bench.load import load_run, records
from inferctl.core import outputs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB: enough for the inputs of a load and for the first 4 MiB of records of one worker."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Write until the disk is full."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.fixture
def file_size(request: pytest.FixtureRequest) -> Iterator[None]:
    """A limit of the file size, which needs no root: this process and its children cannot write larger files."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("file_size", [1 << 20], indirect=True)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_load_without_space_for_records_ends_before_it_sends(
    answering: Callable[..., str], tmp_path: Path, file_size: None, workers: int
) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        measure(answering(), tmp_path / "run", users=2, duration_s=1, workers=workers)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "run"))


@pytest.mark.parametrize("file_size", [5 << 20], indirect=True)
def test_a_load_ends_when_its_records_need_more_space_than_there_is(tmp_path: Path, file_size: None) -> None:
    with known_server.run_server("--bare") as server, pytest.raises(OSError, match="File too large"):
        measure(server.url, tmp_path / "run", users=16, duration_s=100)
    assert len(records.merge(tmp_path / "run")) > 60_000


def test_a_disk_that_fills_up_during_a_load_ends_it(answering: Callable[..., str], disk: Path) -> None:
    def on_progress(live: load_run.LoadProgress) -> None:
        if live.phase == "measure" and not (disk / "filler").exists():
            fill(disk)

    with pytest.raises(OSError, match="No space left on device"):
        measure(answering(), disk, on_progress, users=2, duration_s=2)
    assert len(records.merge(disk)) > 0


def test_a_bench_on_a_full_disk_stops_with_the_error_and_a_hint(
    answering: Callable[..., str], disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk)
    (disk / "filler").write_bytes(b"x" * (3 << 20))
    server = f"mine={answering()}"
    assert cli.run(["bench", "--url", server, "--plan", "quick", "--duration", "1", "--output", "out"]) == 3
    shown = capsys.readouterr().err
    assert "error: no space left on device: " in shown
    assert "hint: free some space, or use another folder" in shown


def test_a_disk_that_is_full_after_the_load_loses_no_figures(
    answering: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "replace", replace)
    line = ["bench", "--url", f"mine={answering()}", "--plan", SHORT_PLAN, "--output", str(tmp_path)]
    assert cli.run(line) == 3
    assert "req/s" in capsys.readouterr().out
