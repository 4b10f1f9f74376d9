"""Tests the parts of a build that need no engine: contexts, command lines, checks, comparison of vectors."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.image import buildx, context, output_checks, running_container
from inferctl.image.context import staged
from inferctl.image.render import Rendered

RENDERED = Rendered("FROM scratch\n", "*\n!a\n", {"locks/server.txt": b"x==1\n", "a/b.yaml": b"k: v\n"}, {}, (), {}, {})
INSPECTED = """Name:          default
Driver:        docker
Last Activity: 2026-01-01 00:00:00 +0000 UTC

Nodes:
Name:             default
Endpoint:         default
Status:           running
BuildKit version: v0.0.0+unknown
Platforms:        linux/amd64, linux/amd64/v2, linux/386
"""
CLASSIC = buildx.read_inspection(INSPECTED, (0, 13, 1), False)


def test_a_context_has_the_rendered_and_server_files_and_is_removed(tmp_path: Path) -> None:
    source = tmp_path / "server.py"
    source.write_text("x = 1\n")
    with staged(RENDERED, {"layers/server/x.py": source}) as (folder, _):
        found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "Dockerfile": "FROM scratch\n",
        ".dockerignore": "*\n!a\n",
        "locks/server.txt": "x==1\n",
        "a/b.yaml": "k: v\n",
        "layers/server/x.py": "x = 1\n",
    }
    assert not folder.parent.exists()


def test_contexts_have_one_base_name_and_each_its_own_times() -> None:
    """BuildKit caches a context by its base name, and treats files with equal sizes and times as equal."""
    with staged(RENDERED, {}) as (first, _), staged(RENDERED, {}) as (second, _):
        assert first.name == second.name
        assert first != second
        assert (first / "a" / "b.yaml").stat().st_mtime_ns != (second / "a" / "b.yaml").stat().st_mtime_ns


def test_links_of_a_snapshot_are_resolved_and_a_plain_folder_is_used_directly(tmp_path: Path) -> None:
    blob, snapshot, plain = tmp_path / "blobs" / "x", tmp_path / "snapshot", tmp_path / "plain"
    for folder in (blob.parent, snapshot / "1_Pooling", plain):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "1_Pooling" / "config.json").symlink_to(blob)
    (plain / "config.json").write_text("{}")
    with staged(replace(RENDERED, contexts={"model": str(plain), "wheels": "w"}), {}) as (_, contexts):
        assert contexts == {"model": str(plain), "wheels": "w"}
    with staged(replace(RENDERED, contexts={"model": str(snapshot)}), {}) as (_, contexts):
        copied = Path(contexts["model"]) / "1_Pooling" / "config.json"
        assert not copied.is_symlink()
        assert copied.read_text() == "{}"
    assert blob.read_text() == "{}"


def test_a_context_is_removed_after_a_failed_build() -> None:
    with pytest.raises(ZeroDivisionError), staged(RENDERED, {}) as (folder, _):
        raise ZeroDivisionError
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "old", "removed"), [("context", True, True), ("context", False, False), ("other", True, False)]
)
def test_the_next_context_removes_those_of_killed_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, old: bool, removed: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = tmp_path / f".inferctl-{name}.{'0' * 32}.partial"
    (killed / "inferctl").mkdir(parents=True)
    if old:
        os.utime(killed, (0, 0))
    with staged(RENDERED, {}) as (running, _):
        os.utime(running.parent, (0, 0))
        with staged(RENDERED, {}):
            assert running.is_dir()
    assert killed.exists() != removed
    assert len(list(tmp_path.iterdir())) == (0 if removed else 1)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder of another user"])
def test_what_others_put_into_the_temporary_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found, target = tmp_path / f".inferctl-context.{'0' * 32}.partial", tmp_path / "target"
    target.mkdir()
    {"pipe": os.mkfifo, "link": lambda path: path.symlink_to(target)}.get(kind, os.mkdir)(found)
    if kind == "folder of another user":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    for path in (target, found):
        os.utime(path, (0, 0))
    with staged(RENDERED, {}):
        pass
    assert os.path.lexists(found) and target.is_dir()


def test_a_full_disk_while_a_context_is_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_inside", lambda *_: Path("/dev/full"))
    with pytest.raises(NotReadyError, match="the disk is full"), staged(RENDERED, {}):
        pass


def test_the_inspection_of_a_builder_is_parsed() -> None:
    assert (CLASSIC.name, CLASSIC.driver, CLASSIC.platforms[0]) == ("default", "docker", "linux/amd64")
    assert not CLASSIC.exports
    assert replace(CLASSIC, containerd_store=True).exports
    assert replace(CLASSIC, driver="docker-container").exports


def test_the_classic_engine_cannot_export_a_cache() -> None:
    request = buildx.BuildRequest(Path(), cache_to=("r/cache:x",))
    with pytest.raises(NotReadyError, match="export a build cache to r/cache:x") as caught:
        buildx.check_supported(CLASSIC, request)
    assert "docker buildx create --use" in (caught.value.hint or "")
    buildx.check_supported(replace(CLASSIC, containerd_store=True), request)


def test_a_platform_that_the_builder_lacks_is_rejected() -> None:
    buildx.check_supported(CLASSIC, buildx.BuildRequest(Path(), platform="linux/386"))
    for platform in ("linux/arm64", "linux/38"):
        with pytest.raises(NotReadyError, match=f"cannot build for {platform};"):
            buildx.check_supported(CLASSIC, buildx.BuildRequest(Path(), platform=platform))


def test_missing_weights_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"weights folder .* not found"):
        buildx.check_supported(CLASSIC, buildx.BuildRequest(Path(), contexts={"model": str(tmp_path / "none")}))


def test_the_command_line(tmp_path: Path) -> None:
    request = buildx.BuildRequest(
        context=Path("/c"),
        contexts={"wheels": str(tmp_path)},
        build_args={"SOURCE_DATE_EPOCH": "1"},
        secrets={"ca": tmp_path / "ca.pem"},
        cache_to=("r/cache:x", "type=inline"),
        cache_from=("r/cache:x",),
        network="host",
        platform="linux/arm64",
        no_cache=True,
        pull=True,
    )
    command = buildx.command(request, Path("/m.json"))
    assert command[:4] == ["docker", "buildx", "build", "--progress=rawjson"]
    assert command[-2:] == ["--load", "/c"]
    pairs = list(itertools.pairwise(command))
    for pair in (
        ("--build-context", f"wheels={tmp_path}"),
        ("--build-arg", "SOURCE_DATE_EPOCH=1"),
        ("--secret", f"id=ca,src={tmp_path}/ca.pem"),
        ("--cache-to", "type=registry,ref=r/cache:x,mode=max"),
        ("--cache-to", "type=inline"),
        ("--cache-from", "type=registry,ref=r/cache:x"),
        ("--network", "host"),
        ("--platform", "linux/arm64"),
    ):
        assert pair in pairs
    assert {"--provenance=false", "--no-cache", "--pull"} <= set(command)
    plain = buildx.command(buildx.BuildRequest(tmp_path), Path("/m.json"))
    assert {"--platform", "--no-cache", "--pull"}.isdisjoint(plain)
    assert not any(part.startswith(("-t", "--tag")) for part in command), "an image is named only once it is verified"


GOOD = [[0.6, 0.8], [1.0, 0.0]]


def test_the_lowest_cosine_counts() -> None:
    assert output_checks.check_vectors(GOOD, GOOD, 2, 0.999) == pytest.approx(1.0)
    turned = [GOOD[0][::-1], GOOD[1]]
    assert output_checks.check_vectors(GOOD, turned, 2, 0.9) == pytest.approx(0.96)


@pytest.mark.parametrize(
    ("vectors", "what"),
    [
        ([[0.6, 0.8], [math.nan, 0.0]], "the vector of text 2 has NaN or infinity in 1 of 2 numbers"),
        ([[0.6, 0.8], [math.inf, 0.0]], "NaN or infinity"),
        ([[0.6, 0.8], [0.0, 0.0]], "zeros"),
        ([[0.6, 0.8], [1.0]], "1 numbers, but the model has 2"),
        ([[0.6, 0.8], [0.0, 1.0]], r"the vector of text 2 differs .* cosine 0\.0"),
        ([[0.6, 0.8]], "different shapes"),
    ],
)
def test_invalid_vectors_have_different_errors(vectors: list[list[float]], what: str) -> None:
    with pytest.raises(InferctlError, match=what) as caught:
        output_checks.check_vectors(vectors, GOOD, 2, 0.999)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("precision", "level", "scores", "expected"),
    [
        ("bf16", "emulated", False, 0.999),
        ("int8", "native", False, 0.99),
        ("int8", "emulated", False, 0.97),
        ("int8", "emulated", True, 0.1),
        ("fp8", "native", False, 0.99),
    ],
)
def test_the_limit_depends_on_what_the_precision_is_on_this_hardware(
    precision: str, level: str, scores: bool, expected: float
) -> None:
    assert output_checks.limit(precision, level, scores=scores) == expected


def test_the_difference_of_scores_is_relative_to_the_largest_one() -> None:
    assert output_checks.check_scores([0.2, -8.1], [0.2, -8.0], 0.02) == pytest.approx(0.1 / 8)
    assert output_checks.check_scores([0.2, 0.91], [0.2, 0.9], 0.02) == pytest.approx(0.01)
    assert output_checks.check_scores([0.2, 0.91], None, None) is None
    with pytest.raises(InferctlError, match=r"text 2 differs .*: -8.20000 instead of -8.00000, the limit is 0.16"):
        output_checks.check_scores([0.2, -8.2], [0.2, -8.0], 0.02)
    with pytest.raises(InferctlError, match="text 1 is NaN or infinity"):
        output_checks.check_scores([math.nan], [0.5], 0.02)
    with pytest.raises(InferctlError, match="text 1 differs"):
        output_checks.check_scores([0.5], [math.nan], 0.02)


def test_links_out_of_a_hub_snapshot_are_mounted_one_by_one(tmp_path: Path) -> None:
    """Those that a server reads: no README, and no exports."""
    blob, snapshot_, plain = tmp_path / "blobs" / "abc", tmp_path / "snapshots" / "1", tmp_path / "plain"
    for folder in (blob.parent, plain, snapshot_ / "1_Pooling", snapshot_ / "onnx"):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    for name in ("1_Pooling/config.json", "vocab.txt", "README.md", "onnx/config.json"):
        (snapshot_ / name).symlink_to(blob)
    mounted = dict.fromkeys(("/model/1_Pooling/config.json", "/model/vocab.txt"), str(blob))
    assert running_container.mounts_of({"/model": snapshot_}) == mounted
    assert running_container.mounts_of({"/model": plain}) == {"/model": str(plain)}
