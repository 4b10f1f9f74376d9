"""The command line of vLLM on a GPU, which the machine of the tests does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, PrecisionInfo
from inferctl.serve.generate import command
from inferctl.serve.generate.command import VllmModel

A100 = DeviceInfo("cuda", "NVIDIA A100-SXM4-80GB", "8.0", 85_000_000_000)
BF16 = PrecisionInfo("auto", "bf16", "native", "it has bf16 tensor cores", "vLLM")


def options(source: str = "org/model", **serve: Any) -> dict[str, str]:
    spec = Spec.model_validate({"name": "m", "model": {"source": source}, "serve": serve})
    model = VllmModel(Path("/model"), serve.get("max_context_tokens", 8192), BF16, "bf16")
    return {each.option: each.value for each in command.options(spec, model, A100, Path("/tmp/x/vllm.sock"))}


def test_a_folder_is_no_name_of_the_model(tmp_path: Path) -> None:
    assert options(str(tmp_path))["--served-model-name"] == "m"


def test_settings_become_options_of_vllm() -> None:
    default = options()
    assert default["--dtype"] == "bfloat16"
    assert default["--max-model-len"] == "8192"
    assert default["--gpu-memory-utilization"] == "0.9"
    assert default["--api-server-count"] == "1"  # else vLLM has one for each of `--data-parallel-size`
    assert default["--served-model-name"] == "m org/model"
    assert not {"--kv-cache-memory-bytes", "--max-num-seqs", "--quantization", "--tensor-parallel-size"} & set(default)
    chosen = options(kv_cache="4GB", gpus=2, max_sequences=64, max_context_tokens=100)
    assert chosen["--kv-cache-memory-bytes"] == "4000000000"
    assert chosen["--gpu-memory-utilization"] == "0.9"  # vLLM compares it with the free memory in any case
    assert options(aliases=["gpt-4o", "m"])["--served-model-name"] == "m org/model gpt-4o"
    assert (chosen["--tensor-parallel-size"], chosen["--max-num-seqs"]) == ("2", "64")


def test_vllm_gets_the_edge_and_no_address_of_a_store(tmp_path: Path) -> None:
    spec = Spec.model_validate({"name": "m", "model": {"source": "org/model"}})
    names = ("METERING_LEDGER", "METERING_BROKER", "ACCESS_KEYS", "ACCESS_BROKER")
    base = {
        "PGPASSWORD": "geheim",
        "PATH": "/bin",
        "VLLM_USE_RUST_FRONTEND": "1",
        **{f"INFERCTL_{name}": "postgresql://u:geheim@h" for name in names},
    }
    model = VllmModel(Path("/model"), 8192, BF16, "bf16")
    found = command.environment(spec, model, A100, tmp_path, "text", base)
    assert "geheim" not in str(found) and found["PATH"] == "/bin"
    assert found["VLLM_USE_RUST_FRONTEND"] == "0"  # it has no edge


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", "", {}),
        ("cuda", "2,3", {}),
        ("cuda:1", "", {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda:1", "2,3", {"CUDA_VISIBLE_DEVICES": "3"}),
        ("cuda:0", "MIG-1-2-3", {"CUDA_VISIBLE_DEVICES": "MIG-1-2-3"}),
    ],
)
def test_a_gpu_is_selected_among_the_visible_ones(device: str, visible: str, expected: dict[str, str]) -> None:
    assert command.visible_gpu(device, {"CUDA_VISIBLE_DEVICES": visible}) == expected


CPU = DeviceInfo("cpu", "a CPU", None, 8_000_000_000)


@pytest.mark.parametrize(
    ("device", "visible", "refused"),
    [
        (A100, "MIG-4b8c3a2e-0d1f-5a5e-9c3b-0a1b2c3d4e5f", True),
        (A100, "0,MIG-4b8c3a2e", True),
        (A100, " MIG-GPU-1/2/0", True),
        (A100, "GPU-4b8c3a2e-0d1f-5a5e-9c3b-0a1b2c3d4e5f", False),
        (A100, "1", False),
        (A100, "", False),
        (CPU, "MIG-4b8c3a2e", False),
    ],
)
def test_a_slice_that_vllm_takes_for_a_gpu_is_refused(device: DeviceInfo, visible: str, refused: bool) -> None:
    if not refused:
        command.check_visible(device, {"CUDA_VISIBLE_DEVICES": visible})
        return
    with pytest.raises(NotReadyError, match="MIG slice") as caught:
        command.check_visible(device, {"CUDA_VISIBLE_DEVICES": visible})
    assert f"NVIDIA_VISIBLE_DEVICES={visible.strip()}" in (caught.value.hint or "")
