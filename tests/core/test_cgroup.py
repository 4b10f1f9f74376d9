"""Limits of cgroups, read from files as the kernel writes them in versions 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inferctl.config.spec import Spec
from inferctl.core import cgroup
from inferctl.core.errors import NotReadyError
from inferctl.models.model import ModelFolder
from inferctl.serve.engine_process import memory
from inferctl.serve.engines.cpu import idle_batches

ALL = len(os.sched_getaffinity(0))
V1 = "4:memory:/docker/id\n1:cpu:/docker/id\n0::/docker/id\n"
# Content of /proc/self/cgroup, files, cores, limit of memory, memory in use.
CASES = {
    "no cgroups": ("", {}, ALL, None, 0),
    "a quota of the parent": ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 1, None, 0),
    "a limit of the parent": (
        "0::/a/b\n",
        {"a/memory.max": "300000", "a/b/memory.max": "max", "a/b/memory.stat": "file 5\nanon 70\n"},
        ALL,
        300_000,
        70,
    ),
    "a container without the path of the host": ("0::/docker/id\n", {"memory.max": "1000"}, ALL, 1000, 0),
    "version 1": (
        V1,
        {"memory/memory.limit_in_bytes": "4096", "memory/memory.stat": "rss 1\ntotal_rss 2\n"},
        ALL,
        4096,
        2,
    ),
    "version 1 without a limit": (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, ALL, None, 0),
}


def write(top: Path, groups: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"cgroup/{name}": text for name, text in files.items()}}.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    monkeypatch.setattr(cgroup, "_PROC", top / "proc")
    monkeypatch.setattr(cgroup, "_CGROUPS", top / "cgroup")


@pytest.mark.parametrize("case", CASES)
def test_limits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, files, cores, limit, used = CASES[case]
    write(tmp_path, groups, files, monkeypatch)
    assert (cgroup.cores(), cgroup.memory_limit(), cgroup.memory_in_use()) == (cores, limit, used)
    assert idle_batches(3) == (0 if "quota" in case else 3)


@pytest.mark.parametrize(
    ("groups", "name", "text"),
    [
        ("0::/\n", "memory.events", "max 9\noom 9\noom_kill {}\noom_group_kill 0\n"),
        (V1, "memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
    ],
)
def test_only_later_kills_count(
    groups: str, name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {name.replace("events", "max").replace("oom_control", "limit_in_bytes"): "5000000"}
    write(tmp_path, groups, limit | {name: text.format(3)}, monkeypatch)
    kills = cgroup.MemoryKills()
    assert kills.text() is None
    (tmp_path / "cgroup" / name).write_text(text.format(4))
    assert "5.0 MB" in (kills.text() or "")


def test_weights_that_exceed_the_limit_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: Path
) -> None:
    """23 million parameters need 45 MB in bf16 and 91 MB in fp32. 60 MB are free."""
    write(tmp_path, "0::/\n", {"memory.max": "360000000", "memory.stat": "anon 300000000\n"}, monkeypatch)
    memory.check(ModelFolder(minilm), "bf16")
    with pytest.raises(NotReadyError, match=r"360\.0 MB.*300\.0 MB.*90\.9 MB"):
        memory.check(ModelFolder(minilm), "fp32")
    # Other libraries than those of an image may need more than the estimate of 451 MB.
    write(tmp_path, "0::/\n", {"memory.max": "520000000"}, monkeypatch)
    assert "at least 650.0 MB" in memory.hint(ModelFolder(minilm))
    write(tmp_path, "0::/\n", {"memory.max": "300000000", "memory.stat": "anon 412900000\n"}, monkeypatch)
    with pytest.raises(NotReadyError) as raised:
        memory.check(ModelFolder(minilm), "fp32")
    assert "at least 503.8 MB" in (raised.value.hint or "")


def test_several_models_are_not_loaded_if_their_sum_exceeds_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: Path
) -> None:
    """Each needs 45 MB of weights, 10 MB of activations and 250 MB for its process. 300 MB are in use."""
    serve = {"precision": "bf16", "max_batch_tokens": 1024}
    models = [{"name": name, "model": {"source": str(minilm)}} for name in ("one", "two")]
    specs = Spec.model_validate({"name": "mix", "models": models, "serve": serve}).each()
    folders = [(spec, ModelFolder(minilm)) for spec in specs]
    write(tmp_path, "0::/\n", {"memory.max": "920000000", "memory.stat": "anon 300000000\n"}, monkeypatch)
    memory.check_all(folders, "cpu")
    write(tmp_path, "0::/\n", {"memory.max": "900000000", "memory.stat": "anon 300000000\n"}, monkeypatch)
    with pytest.raises(
        NotReadyError, match=r"need about 611\.\d MB, estimated, of 600\.0 MB.*one 305\.\d MB.*two 305\.\d MB"
    ):
        memory.check_all(folders, "cpu")


def test_the_free_memory_is_that_of_the_fullest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory._free_on_gpus() is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81000\necho 1000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert memory._free_on_gpus() == 1000 * 2**20
