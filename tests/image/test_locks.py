"""Tests the content of hashed locks and their headers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from inferctl.core import assets
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.image import locks
from tests.processes import inferctl

LOCK = (
    "a-b==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:ab\ntorch==2.13.0+cpu \\\n    --hash=sha256:bb\n"
    "uvicorn[standard]==0.5 ; python_version > '3' \\\n    --hash=sha256:cc\n"
)
SHIPPED = list(catalog.bases().values())
# In the worker that also has the other users of the downloaded wheels.
USES_WHEELS = pytest.mark.xdist_group("docker")


def test_versions_are_read_with_normalized_names() -> None:
    assert locks.versions(LOCK) == {"a-b": "1.0", "torch": "2.13.0+cpu", "uvicorn": "0.5"}
    assert locks.normalize("A_b.C") == "a-b-c"


def test_a_selection_keeps_the_hashes() -> None:
    assert locks.select(LOCK, {"torch"}) == "torch==2.13.0+cpu \\\n    --hash=sha256:bb\n"
    assert locks.select(LOCK, set()) == ""


@pytest.mark.parametrize("base", SHIPPED, ids=lambda base: base.key)
def test_every_shipped_lock_has_a_header_is_hashed_and_is_split_without_overlap(base: catalog.BaseImage) -> None:
    found = locks.load(base, None, int8=True, embed=True)
    texts = [text for text in vars(found).values() if text]
    parts = [locks.versions(text) for text in texts]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert (found.vllm is not None) == (catalog.stack(base.stack).vllm is not None) == (found.embed is None)
    assert locks.versions(found.embed or "").keys() >= ({"pyarrow", "typer", "rich"} if found.embed else set())
    for text in texts:
        assert text.startswith(locks.header(base.stack, base.python.version, "linux/amd64"))
        assert all("--hash=sha256:" in entry for entry in text.split("==")[1:])
        assert "://" not in text


@pytest.mark.parametrize("base", SHIPPED, ids=lambda base: base.key)
def test_every_shipped_lock_has_all_server_requirements_and_no_more(base: catalog.BaseImage) -> None:
    """Fails if a dependency was added without `make locks`."""
    found = locks.load(base, None, int8=True)
    locked = {*locks.versions(found.torch or ""), *locks.versions(found.server)} | set(base.provides)
    declared = {locks.normalize(locks.name_of(line)) for line in locks.server_requirements(catalog.stack(base.stack))}
    # jinja2 is a dependency of torch: a base with torch also has it.
    assert declared - locked - ({"jinja2"} if "torch" in base.provides else set()) == set()
    every = locked | locks.versions(found.int8 or "").keys()
    assert (every - set(base.provides)) & set(locks.LEFT_OUT) == set(), "the server does not import them"
    assert {"pydantic", "pyyaml"} <= locked, "the settings in the image need them"


def test_the_torch_of_a_lock_is_the_one_of_its_stack() -> None:
    for base in SHIPPED:
        torch, stack = locks.load(base, None, int8=False).torch, catalog.stack(base.stack)
        # The local version distinguishes the CPU wheel of PyTorch from the wheel on PyPI, which includes CUDA.
        wanted = f"{stack.torch}+cpu" if stack.cuda is None else stack.torch
        assert torch is None or locks.versions(torch)["torch"] == wanted


@pytest.mark.parametrize("base", ["cpu", "vllm-cpu"])
def test_a_cpu_stack_has_no_package_of_a_gpu(base: str) -> None:
    found = locks.load(catalog.base(base), None, int8=True)
    assert not [name for name in found.versions() if re.match("nvidia|cuda|triton|torchaudio|torchcodec", name)]


def test_the_lock_of_vllm_has_what_vllm_imports_and_embeddings_do_not() -> None:
    for key in ("vllm-cpu", "vllm-cuda13.0"):
        base = catalog.base(key)
        found = locks.load(base, None, int8=True)
        assert {"requests", "setuptools", "networkx"} <= set(locks.versions(found.vllm or "")) <= set(found.versions())
        name, _, version = (catalog.stack(base.stack).vllm or "").partition("==")
        assert found.versions()[name] == version
        assert "bitsandbytes" not in found.versions()


def test_missing_locks_have_a_hint_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        locks.load(replace(catalog.base("cpu"), stack="torch2.6-cu124"), None, int8=False)
    assert "inferctl lock" in (caught.value.hint or "")
    (tmp_path / "server.txt").write_text("x==1\n")
    with pytest.raises(UsageError) as caught:
        locks.load(catalog.base("cpu"), tmp_path, int8=True)
    assert "torch.txt not found" in caught.value.message


@pytest.mark.slow
@USES_WHEELS
def test_a_wheel_folder_resolves_to_its_versions(wheels: Path, tmp_path: Path) -> None:
    """The folder of the fixture has the versions of the shipped locks."""
    inferctl("lock", "--base", "cpu", "--wheels", wheels, "--output", tmp_path, code=0)
    shipped = locks.load(catalog.base("cpu"), None, int8=False)
    for name, text in (("torch", shipped.torch or ""), ("server", shipped.server)):
        assert locks.versions((tmp_path / f"{name}.txt").read_text()) == locks.versions(text)


def copied(folder: Path, stack: str, change: Callable[[str], str] = str) -> Path:
    for file in (assets.root() / "base-images" / "locks" / stack).glob("*.txt"):
        (folder / file.name).write_text(change(file.read_text()))
    return folder


@pytest.mark.parametrize(("base", "python"), [("cuda12.8", "3.12"), ("cuda13.0", "3.11")])
def test_the_lock_of_another_stack_or_python_is_rejected(base: str, python: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, "torch2.13-cu130", lambda text: text.replace("Python 3.12", f"Python {python}"))
    with pytest.raises(UsageError) as caught:
        locks.load(catalog.base(base), folder, int8=False)
    assert f"torch2.13-cu130 and Python {python}" in caught.value.message
    assert f"inferctl lock --base {base}" in (caught.value.hint or "")
