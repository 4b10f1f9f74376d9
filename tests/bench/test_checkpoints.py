"""Tests of prepared checkpoints in plans for generation: `checkpoint: FOLDER` of a configuration."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_samples import ANSWERING, bench, ran

from inferctl import cli
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import plan as plans
from inferctl.bench.report import receipts
from inferctl.cli import bench_setup
from inferctl.cli.bench_options import BenchOptions
from inferctl.core.errors import UsageError
from inferctl.receipts import receipt
from tests.models.decoder_configs import SMOLLM2_135M

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model folder, and the checkpoint that `prepare_int8.py` writes from it."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    model, prepared = folder / "model", folder / "int8"
    model.mkdir()
    config = {**SMOLLM2_135M, "architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(8, 4)}, model / "model.safetensors")
    script = ROOT / "benchmarks" / "prepare_int8.py"
    subprocess.run([sys.executable, str(script), str(model), str(prepared)], check=True, capture_output=True)
    return model, prepared


def plan_of(folder: Path, checkpoint: object) -> Path:
    """Write a plan of bf16 and of a checkpoint into `folder`, and return its file."""
    file = folder / "plan.yaml"
    quantized = {"name": "int8", "precision": "int8", "checkpoint": checkpoint}
    configurations = [{"name": "bf16", "precision": "bf16"}, quantized]
    file.write_text(json.dumps({"name": "p", "configurations": configurations, "repeats": 2}))
    return file


def test_a_plan_names_a_checkpoint_relative_to_its_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, prepared = folders
    file = plan_of(prepared.parent, "int8")
    done = bench_setup.prepare(BenchOptions(None, [str(model)], str(file), output=tmp_path))
    targets = {target.name: target.checkpoint for target in done.targets}
    assert targets == {"bf16": None, "int8": str(prepared)}
    assert done.command
    commands = [list(done.command("int8", tmp_path / "a", checkpoint)) for checkpoint in targets.values()]
    assert [command[command.index("--model") + 1] for command in commands] == [str(model), str(prepared)]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("model", "`original_sha256` in its config.json is missing"),
        ("other", "`original_sha256` in its config.json is 000000000000…, the digest of the model is"),
        ("absent", "config.json cannot be read"),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error(
    folders: tuple[Path, Path], tmp_path: Path, folder: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prepared = folders
    other = prepared.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({"original_sha256": "0" * 64}))
    file = plan_of(prepared.parent, folder)
    assert cli.run(["bench", "--model", str(model), "--plan", str(file), "-o", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the checkpoint of 'int8' is not one of this model" in said
    assert reason in said


def test_a_checkpoint_is_for_generation() -> None:
    configuration = {"name": "a", "precision": "int8", "checkpoint": "/a"}
    plan = plans.Plan.model_validate({"name": "p", "configurations": [configuration]})
    inner = plans.Plan.model_validate(
        {"name": "p", "generate": {"configurations": [{**configuration, "checkpoint": "a"}]}}
    )
    (found,) = inner.with_checkpoints_in(Path("/b")).for_task("generate").configurations
    assert found.checkpoint == "/b/a"
    with pytest.raises(UsageError, match="is for generation"):
        plan.for_task("embed")
    assert plan.for_task("generate").with_overrides(repeats=2).configurations[0].checkpoint == "/a"


def test_a_receipt_has_the_name_of_the_checkpoint_and_its_digest(tmp_path: Path) -> None:
    seen: list[Any] = []

    def command(precision: str, announce: Path, checkpoint: str | None) -> list[str]:
        seen.append(checkpoint)
        return [sys.executable, str(ANSWERING), "--announce", str(announce), "--sha256", "a" * 64]

    target = BenchTarget("int8", "int8", checkpoint="/srv/somebody/models/int8")
    work = dataclasses.replace(bench(tmp_path, "int8"), targets=[target], command=command)
    receipts.write_all(work, ran(work))
    found = receipt.load(tmp_path / "receipts" / "int8.json")
    assert seen == ["/srv/somebody/models/int8"]
    assert (found.data["configuration"]["checkpoint"], found.data["model"]["sha256"]) == ("int8", "a" * 64)
    assert "somebody" not in found.path.read_text()
