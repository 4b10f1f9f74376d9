"""Tests downloads from a small hub on 127.0.0.1.

The calls run in another process, because `huggingface_hub` reads its environment only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inferctl.models import model
from inferctl.models.hub import HubModel
from tests.hub import Hub, Repository, online, serving
from tests.models.adapters import write_adapter, write_base
from tests.models.model_folders import write_model
from tests.processes import python

SOURCE = "org/m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with the other files of a hub repository: pickles, exports, a README."""
    found = write_model(tmp_path / "repository", {"a": [300, 1000]})
    (found / "tokenizer.json").write_text('{"version": "1.0"}')
    (found / model.LIBRARY_FILE).write_text('{"model_type": "CrossEncoder"}')
    (found / "README.md").write_text("hello")
    (found / "pytorch_model.bin").write_bytes(b"pickle")
    for inner in ("onnx", "1_Pooling"):
        (found / inner).mkdir()
        (found / inner / "config.json").write_text("{}")
    return found


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving(
        {SOURCE: folder, "org/gated": Repository(folder, gated=True), "org/old": Repository(folder, counted=False)}
    ) as running:
        yield running


def run(environment: dict[str, str], *calls: str) -> list[str]:
    """Return what each call of `hub` printed: its result, or its error. All run in one process."""
    script = "from inferctl.core import errors\nfrom inferctl.models import hub\n"
    for call in calls:
        script += f"try:\n    print({call})\nexcept errors.InferctlError as e:\n"
        script += "    print(type(e).__name__, e.message, '|', e.hint)\nprint('\\f', end='')\n"
    done = python("-c", script, env=environment, timeout=60)
    assert done.stderr == ""
    found = done.stdout.split("\f")[:-1]
    assert len(found) == len(calls), done
    return found


FETCH = f"hub.fetch({SOURCE!r}, None, lambda done, total: print(done, total)).path"


def test_a_model_is_downloaded_once_with_its_bytes_counted_and_without_what_is_not_loaded(
    hub: Hub, tmp_path: Path
) -> None:
    (shown,) = run(online(hub, tmp_path / "home"), FETCH)
    *steps, path = shown.splitlines()
    counts = [tuple(map(int, line.split())) for line in steps]
    total = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    assert counts[0] == (0, total)
    assert counts[-1] == (total, total)
    assert counts == sorted(counts)
    assert hub.downloads()[-1] == "model.safetensors", "weights come last"
    small = ["1_Pooling/config.json", "config.json", model.LIBRARY_FILE]
    assert sorted(hub.downloads()) == [*small, "model.safetensors", "tokenizer.json"]
    hub.requests.clear()
    assert run(online(hub, tmp_path / "home"), FETCH) == [f"{path}\n"]
    assert hub.requests == []


def test_facts_and_the_commit_need_no_weights(hub: Hub, folder: Path, tmp_path: Path) -> None:
    environment = online(hub, tmp_path / "home")
    facts, commit = run(environment, f"hub.facts({SOURCE!r}, None)", f"hub.commit({SOURCE!r}, 'main')")
    local = model.ModelFolder(folder)
    assert f"parameters={local.parameters}" in facts
    assert f"commit={hub.repositories[SOURCE].commit!r}" in facts
    assert "'architectures': ['BertModel']" in facts
    assert "library_type='CrossEncoder'" in facts
    assert commit.strip() == hub.repositories[SOURCE].commit
    assert "model.safetensors" not in hub.downloads(), "the hub knows the parameters"
    # If the hub does not know the parameters, they come from the header of the weights.
    assert f"parameters={local.parameters}" in run(environment, "hub.facts('org/old', None)")[0]
    assert hub.sent < (folder / "model.safetensors").stat().st_size / 5
    # The files that `facts` downloaded are not a complete model.
    assert run(environment, FETCH)[0].splitlines()[-1].endswith(hub.repositories[SOURCE].commit)


def test_facts_recognize_an_embedding_model_and_count_the_weights_once(tmp_path: Path) -> None:
    shards = {"model-1.safetensors": 5, "model-2.safetensors": 3, "onnx/model.safetensors": 9, "config.json": 1}
    assert HubModel("0", {}, 1, shards).weights_bytes == 8
    sharded = shards | {"model.safetensors.index.json": 1, "consolidated.safetensors": 8, "modules.json": 1}
    assert HubModel("0", {}, 1, sharded).weights_bytes == 8
    assert HubModel("0", {}, 1, sharded).has_modules
    assert not HubModel("0", {}, 1, shards | {"1_Pooling/modules.json": 1}).has_modules


REJECTED = {
    "fetch('org/absent', None, print)": ("UsageError", "hub has no public model of this name"),
    "fetch('org/m', 'v9', print)": ("UsageError", "no revision 'v9'"),
    "fetch('org/gated', None, print)": ("NotReadyError", "denies access to org/gated | accept its terms"),
    "commit('org/m', 'v9')": ("UsageError", "no revision 'v9'"),
    "facts('org/absent', None)": ("UsageError", "hub has no public model of this name"),
    "fetch('org/..--x', None, print)": ("UsageError", "not a hub id"),
}


def test_a_rejected_request_is_one_error_with_a_hint(hub: Hub, tmp_path: Path) -> None:
    found = run(online(hub, tmp_path / "home"), *(f"hub.{call}" for call in REJECTED))
    for shown, (kind, said) in zip(found, REJECTED.values(), strict=True):
        last = shown.splitlines()[-1]
        assert last.startswith(kind) and said in last, shown


def test_without_network_and_offline_the_error_has_a_hint(hub: Hub, tmp_path: Path) -> None:
    calls = (FETCH, f"hub.facts({SOURCE!r}, None)", f"hub.commit({SOURCE!r})")
    for shown in run(online("http://127.0.0.1:9", tmp_path / "home"), *calls):
        assert shown.startswith("NotReadyError"), shown
        assert "http://127.0.0.1:9" in shown
        assert "check the network" in shown
    for shown in run({**online(hub, tmp_path / "home"), "HF_HUB_OFFLINE": "1"}, *calls):
        assert "HF_HUB_OFFLINE" in shown
    assert hub.requests == []


def test_the_error_names_a_cache_that_is_not_writable_and_a_failing_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (shown,) = run(online(hub, tmp_path / "file"), FETCH)
    assert "NotReadyError" in shown and str(tmp_path / "file") in shown
    hub.status = 500
    (shown,) = run(online(hub, tmp_path / "home"), FETCH)
    assert shown.startswith("NotReadyError") and hub.url in shown


def test_an_adapter_is_downloaded_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base)
    wanted, on = "[hub.AdapterSource(name='a', source='org/a')]", f"hub.ModelFolder(hub.Path({str(base)!r}))"
    call = f"hub.fetch_adapters({wanted}, {on}, lambda _: lambda *_: None)[0].layers"
    with serving({"org/a": tmp_path / "adapter"}) as hub:
        first = run(online(hub, tmp_path / "home"), call)
        assert "model.layers.1.self_attn.v_proj" in first[0]
        assert hub.downloads() == ["adapter_config.json", "adapter_model.safetensors"]
        hub.requests.clear()
        assert run(online(hub, tmp_path / "home"), call) == first
        assert hub.requests == []
