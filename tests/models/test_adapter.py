"""What of an adapter is read, and which adapters are refused before vLLM would ignore, or partly apply, them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.core.errors import UsageError
from inferctl.models import adapter
from inferctl.models.adapter import Adapter, Slots
from inferctl.models.model import ModelFolder
from tests.models.adapters import HOSTILE, WEIGHTS, WRONG, Edit, settings, write_adapter, write_base, write_wrong


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(write_base(tmp_path_factory.mktemp("base")))


def read(folder: Path, base: ModelFolder, edit: Edit = lambda *_: None) -> Adapter:
    return adapter.read("mine", write_adapter(folder, base.path, edit), base)


@pytest.mark.parametrize("case", [*WRONG, *HOSTILE])
def test_an_adapter_that_is_not_applied_as_peft_does_is_refused(tmp_path: Path, base: ModelFolder, case: str) -> None:
    reason = WRONG[case][1] if case in WRONG else HOSTILE[case][1]
    with pytest.raises(UsageError, match=reason) as refused:
        adapter.read("mine", write_wrong(tmp_path / "adapter", base.path, case), base)
    assert refused.value.message.startswith("adapter mine: ")
    assert refused.value.hint


@pytest.mark.parametrize(
    ("edit", "scale", "value_scale"),
    [
        (settings(), 2, 2),
        (settings(use_rslora=True), 4, 4),
        (settings(alpha_pattern={"v_proj": 4}), 2, 1),
        (settings(alpha_pattern={r"^model.layers.0.self_attn.v_proj": 4, r"layers\.1\.self_attn.v_proj": 4}), 2, 1),
        (settings(alpha_pattern={"proj": 4}), 2, 2),  # no whole name
        (settings(target_modules=r"((.*)+)+_proj"), 2, 2),  # never run
        (settings(target_modules="all-linear", init_lora_weights="gaussian", task_type=None), 2, 2),
    ],
)
def test_rank_and_scale_are_those_of_peft(
    tmp_path: Path, base: ModelFolder, edit: Edit, scale: float, value_scale: float
) -> None:
    found = read(tmp_path / "adapter", base, edit)
    assert set(found.layers.values()) == {(4, scale), (4, value_scale)}
    assert found.layers["model.layers.1.self_attn.v_proj"] == (4, value_scale)
    assert len(found.layers) == 4
    assert (found.rank, found.bytes) == (4, (found.path / WEIGHTS).stat().st_size)


def test_new_weights_have_a_new_digest(tmp_path: Path, base: ModelFolder) -> None:
    folders = [write_adapter(tmp_path / str(number), base.path, seed=number // 2) for number in range(3)]
    first, same, other = (adapter.read("mine", folder, base).digest for folder in folders)
    assert first == same != other


def test_slots_have_the_next_rank_of_vllm_for_each_layer_and_both_uses_of_a_tied_table(
    tmp_path: Path, base: ModelFolder
) -> None:
    adapters = [read(tmp_path / "adapter", base)] * 9
    slots = Slots.of(adapters, "cuda")
    assert (slots, Slots.of(adapters, "cpu")) == (Slots(8, 8), Slots(10, 8))
    assert (Slots.of(adapters, "cpu", 2, 16), Slots.of([], "cuda", 2, 16)) == (Slots(12, 16), Slots(2, 16))
    assert slots.numbers(base) == 8 * 8 * (2 * (32 + 32 + 16 + 32 + 32 + 64) + 2 * (100 + 32))


def test_check_counts_the_slots_and_refuses_an_adapter_that_does_not_fit(
    tmp_path: Path, base: ModelFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {"good": write_adapter(tmp_path / "good", base.path)}
    spec = {"name": "m", "image": {"base": "vllm-cuda13.0"}, "hardware": ["a100-80gb-sxm"]}

    def check(code: int, **model: object) -> dict[str, Any]:
        adapters = [{"name": name, "source": str(folder)} for name, folder in sources.items()]
        spec["model"] = {"source": str(base.path), "adapters": adapters, **model}
        (tmp_path / "inferctl.yaml").write_text(json.dumps(spec))
        assert cli.run(["check", "--json"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        found["adapters"] = [(each["level"], each["what"]) for each in found["findings"] if each["topic"] == "adapter"]
        return found

    found = check(0)
    assert found["hardware"][0]["memory"]["adapters_bytes"] == Slots(1, 8).numbers(base) * 2
    assert found["adapters"][0][1].startswith("adapter good: rank 4, 4 layers, ")
    assert check(2, task="embed")["adapters"] == [("error", "the task embed has no adapters")]
    sources |= {
        "absent": Path("org/absent"),
        "wrong": write_adapter(tmp_path / "w", base.path, settings(use_dora=True)),
    }
    assert [level for level, _ in check(2)["adapters"]] == ["ok", "warn", "error"]
