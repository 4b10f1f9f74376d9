"""Tests the catalog facts, their sources, and files with facts of a user."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.core import assets
from inferctl.core.errors import UsageError
from inferctl.facts import catalog, precision

# Fields without a source: names and text, not facts.
_NOT_FACTS = {"key", "name", "kind", "description", "sm_complete", "default_for", "notes", "sources", "prices"}
_ENTRIES = [*catalog.bases().values(), *catalog.stacks().values(), *catalog.hardware_profiles().values()]


@pytest.mark.parametrize("entry", _ENTRIES, ids=lambda entry: entry.key)
def test_every_fact_has_a_source_and_every_gap_a_reason(entry: Any) -> None:
    sourced = {fact for source in entry.sources for fact in source.facts}
    values = {name: value for name, value in asdict(entry).items() if name not in _NOT_FACTS}
    known = {name for name, value in values.items() if value not in (None, (), {}, [])}
    if isinstance(entry, catalog.Hardware) and not any(value is not None for value in entry.peaks.values()):
        known -= {"peaks"}
    # A stack without an index uses PyPI. One without vLLM is for embeddings.
    gaps = {name for name, value in values.items() if value is None} - {"mig", "index", "vllm", "vllm_bytes"}
    assert known <= sourced, "facts without a source"
    assert gaps <= set(entry.notes), "unknown without a reason"
    for source in entry.sources:
        assert source.source.strip()
        if source.kind != "own-choice":
            assert "https://" in source.source, "a source without a link"
            assert source.date is not None, "a source without the day of reading"


def test_the_table_of_drivers_has_a_link_and_a_date() -> None:
    table = yaml.safe_load((assets.root() / "base-images" / "drivers.yaml").read_text())
    for source in table["sources"]:
        assert "https://" in source["source"]
        assert source["date"].year >= 2026
    assert list(table["cuda"]) == sorted(table["cuda"])
    assert {"cuda", "oldest_driver"} <= {fact for source in table["sources"] for fact in source["facts"]}
    parts = {part.compute_capability for part in catalog.hardware_profiles().values()} - {None}
    assert parts <= set(table["oldest_driver"]), "a part without an oldest driver"


@pytest.mark.parametrize("entry", catalog.hardware_profiles().values(), ids=lambda entry: entry.key)
def test_every_price_has_a_source_and_a_date(entry: catalog.Hardware) -> None:
    assert entry.prices or "prices" in entry.notes
    for price in entry.prices:
        assert 0.1 < price.usd_per_hour < 20
        assert "https://" in price.source, "a price without a link"
        assert price.date.year >= 2026


def test_a_base_and_its_stack_are_compatible() -> None:
    for base in catalog.bases().values():
        stack = catalog.stack(base.stack)
        assert base.key in stack.default_for
        assert base.python.version in stack.python
        assert stack.driver_floor == base.driver_floor
        major = stack.cuda and stack.cuda.split(".")[0]
        assert major == (base.cuda and base.cuda.split(".")[0])


def test_a_kernel_runs_on_a_newer_minor_of_its_major_and_on_no_other() -> None:
    modern = catalog.stack("torch2.13-cu130")
    assert "8.9" not in modern.sm
    assert modern.has_kernels((8, 9)) is True
    assert modern.has_kernels((11, 0)) is False
    assert catalog.stack("torch2.6-cu124").has_kernels((9, 0)) is None
    assert catalog.stack("ngc25.12").has_kernels((8, 0)) is None
    with_ptx = replace(modern, ptx=True)
    assert [with_ptx.has_kernels(each) for each in ((13, 0), (7, 0))] == [True, False]


def test_bf16_on_a_t4_is_emulated_and_has_no_peak() -> None:
    t4 = catalog.hardware("t4")
    how = precision.support("bf16", t4.traits)
    assert how.level == "emulated"
    assert "compute capability 7.5" in how.reason
    assert "fp16" in how.reason
    assert t4.peaks == {"fp32": 8.1, "fp16": 65, "bf16": None, "int8": 130}
    assert precision.support("fp16", t4.traits).level == "native"


@pytest.mark.parametrize(
    ("key", "best"),
    [("t4", "fp16"), ("l4", "bf16"), ("a100-40gb-mig-1g.5gb", "bf16"), ("h200-sxm", "bf16"), ("cpu", "fp32")],
)
def test_auto_selects_the_best_native_precision(key: str, best: str) -> None:
    assert precision.best_precision(catalog.hardware(key).traits) == best


def test_half_an_a100_is_39_percent_of_its_multiprocessors_and_half_its_memory() -> None:
    whole, half = catalog.hardware("a100-40gb-sxm"), catalog.hardware("a100-40gb-mig-3g.20gb")
    assert half.mig is not None
    assert (half.sm_count, half.mig.compute_share) == (42, 42 / 108)
    assert f"{half.mig.compute_share:.1%}" == "38.9%"
    assert (half.memory_bytes, half.bandwidth_gbs) == (20_000_000_000, 777.5)
    assert half.peaks["bf16"] == pytest.approx(312 * 42 / 108)
    assert half.traits == whole.traits
    assert half.labels["nvidia.com/gpu.product"] == "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"


def test_mig_mode_uses_nine_tenths_of_an_a100_and_all_of_an_h100() -> None:
    slices = [part for part in catalog.hardware_profiles().values() if part.mig]
    for gpu, multiprocessors, at_most in (
        ("a100", [14, 28, 42, 56, 98] * 2, [7, 3, 2, 1, 1] * 2),
        ("h100-80gb", [16, 26, 32, 60, 64, 132], [7, 4, 3, 2, 1, 1]),
    ):
        found = [part for part in slices if part.key.startswith(gpu)]
        assert [part.sm_count for part in found] == multiprocessors
        assert [part.mig.at_most for part in found if part.mig] == at_most


def test_peaks_are_dense() -> None:
    """Many pages print the sparse figure, which is twice the dense one. An A10G is not an A10."""
    peaks = {"h100-sxm": 989, "h200-sxm": 989, "a100-80gb-sxm": 312, "a10": 125, "a10g": 70}
    assert {key: catalog.hardware(key).peaks["bf16"] for key in peaks} == peaks


@pytest.mark.parametrize(
    ("name", "memory_bytes", "key"),
    [
        ("Tesla T4", 15_843_721_216, "t4"),
        ("NVIDIA L4", 23_576_576_000, "l4"),
        ("NVIDIA A10", 23_696_375_808, "a10"),
        ("NVIDIA L40S", 47_576_711_168, "l40s"),
        ("NVIDIA A100-PCIE-40GB", None, "a100-40gb-pcie"),
        ("NVIDIA A100 80GB PCIe", 85_899_345_920, "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-80GB", 85_899_345_920, "a100-80gb-sxm"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20_937_965_568, "a100-40gb-mig-3g.20gb"),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", None, "a100-80gb-mig-1g.10gb"),
        ("NVIDIA H100 80GB HBM3", 85_520_809_984, "h100-sxm"),
        ("NVIDIA H200", 150_754_820_096, "h200-sxm"),
        ("NVIDIA H100 NVL", 100_000_000_000, "h100-nvl"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10_468_982_784, "h100-80gb-mig-1g.10gb"),
        ("NVIDIA A10G", 23_684_000_000, "a10g"),
        ("NVIDIA B200", 191_500_000_000, "b200-sxm"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 102_641_958_912, "rtx-pro-6000-server"),
        ("NVIDIA A100-SXM4-40GB", 85_899_345_920, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_a_device_is_detected_by_its_exact_name(name: str, memory_bytes: int | None, key: str | None) -> None:
    found = catalog.detect_gpu(name, memory_bytes)
    assert (found and found.key) == key


@pytest.mark.parametrize(
    ("key", "offered"),
    [
        ("a100", ["a100-40gb-pcie", "a100-40gb-sxm", "a100-80gb-pcie", "a100-80gb-sxm"]),
        ("a100-80gb", ["a100-80gb-pcie", "a100-80gb-sxm"]),
        ("h100", ["h100-nvl", "h100-pcie", "h100-sxm"]),
        ("T4", ["t4"]),
    ],
)
def test_an_unknown_prefix_suggests_the_matching_hardware(key: str, offered: list[str]) -> None:
    with pytest.raises(UsageError, match=r"hardware .* not found") as caught:
        catalog.hardware(key)
    assert caught.value.hint == f"did you mean {'one of ' if len(offered) > 1 else ''}{', '.join(offered)}?"


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(UsageError) as caught:
        catalog.base("windows")
    assert caught.value.hint == "known: cpu, cuda12.8, cuda13.0, ngc25.12, vllm-cpu, vllm-cuda13.0"


def test_the_vocabulary_has_the_names_of_the_catalog() -> None:
    vocabulary = catalog.vocabulary()
    assert vocabulary["hardware"] == list(catalog.hardware_profiles())
    assert vocabulary["image.base"] == list(catalog.bases())


BASE, GPU = "base-images/cuda13.0.yaml", "benchmarks/hardware/t4.yaml"


def changed(folder: Path, shipped: str, **change: Any) -> str:
    """Write a copy of a shipped file with other values."""
    own = yaml.safe_load((assets.root() / shipped).read_text())
    (folder / "own.yaml").write_text(yaml.safe_dump({**own, **change}))
    return str(folder / "own.yaml")


def test_a_base_can_be_read_from_a_file(tmp_path: Path) -> None:
    found = catalog.base(changed(tmp_path, BASE, digest="sha256:" + "0" * 64))
    assert (found.key, found.driver_floor) == ("own", 580)


@pytest.mark.parametrize(
    ("shipped", "change", "message"),
    [
        (BASE, {"driver_floor": "new"}, "driver_floor: Input should be a valid integer"),
        (BASE, {"driverfloor": 580}, "unknown keys driverfloor"),
        (BASE, {"python": {"version": "3.12"}}, "python.executable: Field required"),
        (GPU, {"compute_capability": "seven"}, "'seven' is not a compute capability"),
        (GPU, {"compute_capability": None}, "compute_capability is required for kind cuda"),
        (GPU, {"peaks": {"fp32": 1.0}}, "peaks lack bf16, fp16, int8"),
    ],
)
def test_an_error_in_a_catalog_file_is_reported(
    tmp_path: Path, shipped: str, change: dict[str, Any], message: str
) -> None:
    read: Any = catalog.base if shipped == BASE else catalog.hardware
    with pytest.raises(UsageError) as caught:
        read(changed(tmp_path, shipped, **change))
    assert message in caught.value.message
    assert caught.value.hint


def test_a_base_can_be_based_on_another_and_replaces_facts_with_their_sources(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    source = {"facts": ["end_of_life"], "source": "our contract", "kind": "own-choice"}
    ours = {"based_on": "cuda13.0", "end_of_life": "2030-01-31", "sources": [source]}
    file.write_text(yaml.safe_dump(ours))
    found, parent = catalog.base(str(file)), catalog.base("cuda13.0")
    assert (found.key, str(found.end_of_life), found.reference) == ("ours", "2030-01-31", parent.reference)
    assert [source.source for source in found.sources if "end_of_life" in source.facts] == ["our contract"]
    assert {fact for source in found.sources for fact in source.facts} == {
        fact for source in parent.sources for fact in source.facts
    }
    file.write_text("based_on: cuda13\n")
    with pytest.raises(UsageError, match="base image 'cuda13' not found"):
        catalog.base(str(file))


@pytest.mark.parametrize("base", list(catalog.bases()))
def test_generation_needs_a_base_with_vllm_and_other_tasks_one_without(base: str) -> None:
    entry = catalog.base(base)
    stack = catalog.stack(entry.stack)
    wrong = ["embed", "rerank", "classify"] if stack.vllm else ["generate"]
    for task in {"auto", "embed", "rerank", "classify", "generate"} - set(wrong):
        catalog.check_task(task, entry, stack)
    for task in wrong:
        with pytest.raises(UsageError, match=f"the base {base} is") as caught:
            catalog.check_task(task, entry, stack)
        assert ("vllm-cuda13.0" in (caught.value.hint or "")) == (task == "generate")
