"""Telemetry from recorded GPU samples, from energy counters in a folder, and from this machine."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_samples import steady, text_of

from inferctl.bench.judge.efficiency import efficiency
from inferctl.bench.measure import nvml, sensors, telemetry
from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.nvml import GpuDevice, GpuProcess, GpuSample
from inferctl.bench.measure.outcome import BenchTarget, Measurement, Outcome, WorkloadRecord
from inferctl.bench.measure.telemetry import Telemetry
from inferctl.bench.plan import plan
from inferctl.bench.report import html, result
from inferctl.bench.report.receipts import write_all
from inferctl.bench.report.rows import MeasuredRow
from inferctl.facts import catalog

SECOND = 10**9
T4 = GpuDevice(0, "Tesla T4", 16 * 10**9, "580.65", 70.0, 70.0, sliced=False, slices=())
SAMPLE = GpuSample(
    0,
    utilisation_percent=90.0,
    memory_bytes=10**9,
    power_w=60.0,
    energy_j=None,
    sm_clock_mhz=1500,
    temperature_c=70,
    throttle=0,
    processes=(GpuProcess(10),),
)


def recorded(count: int = 10, **changes: Any) -> list[GpuSample]:
    """Return a sample for each half second. A change may be a function of the sample number."""
    return [
        dataclasses.replace(
            SAMPLE,
            at_ns=i * SECOND // 2,
            **{name: value(i) if callable(value) else value for name, value in changes.items()},
        )
        for i in range(count)
    ]


def judged(samples: list[GpuSample], device: GpuDevice = T4, ours: set[int] | None = None, earlier: Any = ()) -> Any:
    found = telemetry.of_gpu(device, samples, {10} if ours is None else ours, earlier)
    assert found is not None
    return telemetry.gpu_validity(Telemetry(gpus=(found,)))


OWN, FOREIGN = GpuProcess(10), GpuProcess(4_000_001)
ANOTHER = "another process was on Tesla T4 during the run (process 4000001)"


@pytest.mark.parametrize(
    ("processes", "earlier", "sliced", "reason", "caution"),
    [
        ((OWN,), (), False, "", ""),
        (lambda i: (OWN, FOREIGN) if i == 3 else (OWN,), (), False, ANOTHER, ""),
        # In a container, NVML returns the ids of the host. The id of the server is 555 there.
        ((GpuProcess(555),), (), False, "", ""),
        ((GpuProcess(555), FOREIGN), (FOREIGN,), False, ANOTHER, ""),
        ((GpuProcess(555), FOREIGN), (), False, "", "their ids do not show which are the server's"),
        ((GpuProcess(10, 1), GpuProcess(4_000_001, 2)), (), True, "", "other slices of Tesla T4 were in use"),
        ((GpuProcess(10, 1), GpuProcess(4_000_001, 1)), (), True, ANOTHER, ""),
    ],
)
def test_another_process_on_the_gpu_or_slice_makes_a_run_invalid(
    processes: Any, earlier: Any, sliced: bool, reason: str, caution: str
) -> None:
    found = judged(recorded(processes=processes), dataclasses.replace(T4, sliced=sliced), earlier=earlier)
    assert [bool(found.reasons), bool(found.cautions)] == [bool(reason), bool(caution)]
    assert reason in "".join(found.reasons) and caution in "".join(found.cautions)


@pytest.mark.parametrize(
    ("mask", "cause"),
    [(0x20, "heat"), (0x48, "heat"), (0x88, "power brake"), (0x08, "hardware"), (0x200, "board limit"), (0x113, None)],
)
def test_clocks_held_down_make_a_run_invalid(mask: int, cause: str | None) -> None:
    """In 10% of the samples they are a reason, in 5% a warning. An idle GPU and clocks set by hand are neither."""
    often, rarely = (judged(recorded(20, throttle=lambda i, n=n: mask if i < n else 0)) for n in (2, 1))
    said = f"Tesla T4 reduced its clocks in {{}}% of the samples ({cause}): "
    assert [each.startswith(said.format(10)) for each in often.reasons] == [True] * bool(cause)
    assert [each.startswith(said.format(5)) for each in rarely.cautions] == [True] * bool(cause)
    assert not rarely.reasons


def test_a_part_at_its_own_power_limit_is_undisturbed_and_one_that_was_lowered_is_another_part() -> None:
    own = judged(recorded(throttle=0x04))
    assert (own.reasons, own.cautions) == ((), ())
    capped = dataclasses.replace(T4, index=1, power_limit_w=50.0)
    (reason,), (caution,) = judged(recorded(throttle=0x04), capped).reasons, judged(recorded(), capped).cautions
    for said in (reason, caution):
        assert "lowered to 50 W of 70 W" in said and "reset it with `nvidia-smi -i 1 -pl 70`" in said


def test_what_a_part_does_not_tell_stays_unknown() -> None:
    told = ("utilisation_percent", "memory_bytes", "power_w", "sm_clock_mhz", "temperature_c")
    found = telemetry.of_gpu(T4, recorded(throttle=None, processes=None, **dict.fromkeys(told)), {10}, ())
    assert found is not None
    assert {getattr(found, key) for key in (*told, "throttled", "joules")} == {None}
    assert telemetry.gpu_validity(Telemetry(gpus=(found,))).valid


def test_energy_is_the_parts_own_counter_else_power_over_time() -> None:
    counted = telemetry.of_gpu(T4, recorded(11, energy_j=lambda i: 1000.0 + 40 * i), {10}, ())
    assert counted is not None
    assert (counted.joules, counted.joules_from) == (400.0, "counter")
    # 0 W rising to 100 W in five seconds: 250 J.
    risen = telemetry.of_gpu(T4, recorded(11, power_w=lambda i: 10.0 * i), {10}, ())
    assert risen is not None
    assert (risen.joules, risen.joules_from) == (250.0, "power, integrated")


class Played:
    """GPUs with recorded samples, instead of NVML."""

    def __init__(self, devices: list[GpuDevice], samples: list[list[GpuSample]]) -> None:
        self._devices, self._samples, self._next = devices, samples, [0] * len(devices)

    def devices(self) -> list[GpuDevice]:
        return self._devices

    def sample(self, index: int, at_ns: int) -> GpuSample:
        place = min(self._next[index], len(self._samples[index]) - 1)
        self._next[index] += 1
        return dataclasses.replace(self._samples[index][place], at_ns=at_ns)

    def close(self) -> None:
        pass


def watched(played: Played, **options: Any) -> Telemetry:
    with sensors.MachineMonitor(played, every_s=0.01) as watch:
        watch.process_roots.add(os.getpid())
        started = time.monotonic_ns()
        while len(watch.samples) < 8:
            time.sleep(0.01)
        return watch.window(started, time.monotonic_ns(), {"device": {"kind": "cuda"}}, **options)


def test_the_gpu_that_the_server_is_on_is_the_one_that_counts() -> None:
    two = [T4, dataclasses.replace(T4, index=1, name="Other T4")]
    ours = [dataclasses.replace(SAMPLE, processes=(GpuProcess(os.getpid()),))]
    others = [dataclasses.replace(SAMPLE, processes=(GpuProcess(4_000_001),))]
    found = watched(Played(two, [others, ours]))
    assert [gpu.name for gpu in found.gpus] == ["Other T4"]
    assert telemetry.gpu_validity(found).valid


def test_gpus_are_no_business_of_a_server_on_the_cpu_or_elsewhere() -> None:
    with sensors.MachineMonitor(Played([T4], [[SAMPLE]]), every_s=0.01) as watch:
        time.sleep(0.1)
    end = time.monotonic_ns()
    assert watch.window(0, end, {"device": {"kind": "cpu"}}).gpus == ()
    assert len(watch.window(0, end, {}).gpus) == 1
    away = watch.window(0, end, {}, on_this_machine=False)
    assert away.gpus == ()
    assert "another machine" in away.absent["gpu"]


def test_this_machine_can_be_watched_and_says_what_it_lacks() -> None:
    with sensors.MachineMonitor(every_s=0.05) as watch:
        start = time.monotonic_ns()
        time.sleep(0.2)
        found = watch.window(start, time.monotonic_ns(), {})
    assert bool(found.gpus) != ("gpu" in found.absent)


class FakeError(Exception):
    pass


def test_samples_hold_what_nvml_says_and_nothing_where_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise FakeError("not supported")

    told: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetName": lambda handle: "Tesla T4",
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=16 * 10**9, used=10**9),
        "nvmlDeviceGetPowerUsage": lambda handle: 61_500,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=93, memory=40),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            SimpleNamespace(pid=7, gpuInstanceId=0xFFFFFFFF),
            SimpleNamespace(pid=8, gpuInstanceId=2),
        ],
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1590,
        "nvmlDeviceGetTemperature": lambda handle, kind: 71,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 70_000,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: 70_000,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: [7, 5],
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceGetTotalEnergyConsumption": unsupported,
    }
    fake = SimpleNamespace(NVMLError=FakeError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, **told)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    gpus = nvml.Nvml()
    assert gpus.devices() == [dataclasses.replace(T4, compute_capability="7.5")]
    fake.nvmlDeviceGetCudaComputeCapability = unsupported
    assert gpus.devices() == [T4]
    assert gpus.sample(0, 5) == GpuSample(5, 93.0, 10**9, 61.5, None, 1590, 71, 4, (GpuProcess(7), GpuProcess(8, 2)))


def document(joules: float | None = 500.0, *, sliced: bool = False) -> dict[str, Any]:
    """Return the telemetry of a run on one GPU for ten seconds."""
    made = telemetry.of_gpu(T4, recorded(), {10}, ())
    assert made is not None
    gpu = dataclasses.replace(made, joules=joules, seconds=10.0, sliced=sliced)
    return Telemetry(gpus=(gpu,)).as_dict()


RATES = {"requests_per_s": 100.0, "texts_per_s": 400.0}


def test_energy_and_money_per_request_and_per_text() -> None:
    runs = [({"seconds": 10, "requests_per_s": 100.0}, {"server_cores": 1.5})]
    found = efficiency(RATES, [document(500), document(700)], runs, "t4")
    assert found["watts"] == 60  # 50 W and 70 W
    assert found["joules_per_1000_requests"] == 600
    assert found["joules_per_million_texts"] == 150_000
    assert found["cpu_seconds_per_1000_requests"] == 15
    cheapest = found["cost"][0]
    assert cheapest["usd_per_million_texts"] == pytest.approx(cheapest["usd_per_hour"] / 3600 / 400 * 1e6, rel=1e-3)
    assert all(one["source"] and one["date"] for one in found["cost"])
    assert found["unknown"] == {}


@pytest.mark.parametrize(
    ("runs", "hardware", "why"),
    [
        ([document(None)], "t4", {"joules": "Tesla T4 does not report its power"}),
        (
            [document(sliced=True)], "a100-40gb-sxm-mig-3g.20gb",
            {"joules": "Tesla T4 counts energy for all of its slices together"},
        ),
        ([document(), {}], "t4", {"joules": "no energy counter was read"}),
        ([], "cpu", {"joules": "no run has telemetry", "cost": "the catalog has no price for cpu"}),
        ([document()], None, {"cost": "this hardware is not in the catalog"}),
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_made_up(
    runs: list[dict[str, Any]], hardware: str | None, why: dict[str, str]
) -> None:
    found = efficiency(RATES, runs, [], hardware)
    assert why.items() <= found["unknown"].items()
    assert (found["joules_per_million_texts"] is None) == ("joules" in why)
    assert (found["cost"] == []) == ("cost" in found["unknown"])


def test_the_power_of_several_gpus_is_known_only_if_the_server_was_seen_on_them() -> None:
    """The process ids that NVML returns may be those of another namespace: a server is then seen on no GPU."""
    unseen, seen = (telemetry.of_gpu(T4, recorded(), pids, ()) for pids in (set[int](), {10}))
    assert unseen
    assert seen
    one, two = Telemetry(gpus=(unseen,)).as_dict(), Telemetry(gpus=(unseen, unseen)).as_dict()
    assert efficiency(RATES, [one], [], "t4")["watts"] == 60
    found = efficiency(RATES, [two], [], "t4")
    assert (found["watts"], found["unknown"]["joules"]) == (None, "it is unknown which GPU the server used")
    assert efficiency(RATES, [Telemetry(gpus=(seen, seen)).as_dict()], [], "t4")["watts"] == 120


def test_the_lowest_price_comes_first_in_whatever_order_the_catalog_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = catalog.hardware_profiles()
    (price,) = profiles["t4"].prices
    prices = [dataclasses.replace(price, usd_per_hour=dollars) for dollars in (0.9, 0.4, 1.2)]
    monkeypatch.setitem(profiles, "t4", dataclasses.replace(profiles["t4"], prices=tuple(prices)))
    assert [one["usd_per_hour"] for one in efficiency(RATES, [document()], [], "t4")["cost"]] == [0.4, 0.9, 1.2]


def test_cpu_seconds_and_requests_are_those_of_the_same_runs() -> None:
    """A run at half the rate on half the cores costs the same. A run without resources does not count."""
    runs = [
        ({"seconds": 10, "requests_per_s": 100.0 * n}, {"server_cores": float(n)} if n < 3 else {}) for n in (2, 1, 9)
    ]
    found = efficiency({"requests_per_s": 400.0, "texts_per_s": 400.0}, [document()] * 3, runs, "t4")
    assert found["cpu_seconds_per_1000_requests"] == 10
    nothing = {"requests_per_s": 0.0, "texts_per_s": 0.0, "seconds": 10}
    found = efficiency(nothing, [document()], [(nothing, {"server_cores": 1})], "t4")
    assert (found["joules_per_million_texts"], found["cost"]) == (None, [])


def test_a_shared_gpu_is_said_above_the_numbers_and_ends_with_5(tmp_path: Path) -> None:
    shared = telemetry.of_gpu(T4, recorded(processes=(GpuProcess(10), GpuProcess(4_000_001))), {10}, ())
    assert shared is not None
    measured = Measurement(
        plan.Run("fp16", 0), 0.0, steady(100, 10), {"steady": True}, {}, tmp_path, {}, 1,
        telemetry=Telemetry(gpus=(shared,)), workload=WorkloadRecord(corpus="short", seed=1, sha256="ab"),
        load=plan.read_plan("quick").load,
    )  # fmt: skip
    outcome = Outcome(BenchTarget("fp16", "fp16"), [measured])
    work = Bench(plan.read_plan("quick"), [], None, None, tmp_path)
    sealed = write_all(work, [outcome])
    found = result.collect(work, [outcome], sealed, tmp_path / "report.html")
    problem = result.problem(found)
    assert problem is not None
    assert problem.exit_code == 5
    text = text_of(found, 200)
    assert text.index("INVALID fp16: another process was on Tesla T4") < text.index("config")
    (row,) = found.rows
    assert isinstance(row, MeasuredRow)
    assert row.gpu_utilisation_percent == 90
    page = html.render(found, sealed)
    assert page.index("another process was on Tesla T4 during the run") < page.index("<h2>Results</h2>")
