"""The arithmetic of a deployment. Expected numbers are worked out by hand in the comments."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.config.deploy_spec import Traffic
from inferctl.deploy import sizing
from inferctl.deploy.figure import Figure
from inferctl.deploy.plan import Rate, TrafficPlan
from inferctl.deploy.sizing import Demand
from inferctl.models import model
from tests.deploy import plans

FAST = Rate(90_000.0, measured=True, source="", seal="01234567")
SLOW = Rate(20_000.0, measured=False, source="")
COLD = Figure("cold start", 240.0, "s", "", "spec")


def traffic(base: float, peak: float, tokens: float = 120.0, rise: float = 60.0) -> TrafficPlan:
    settings = Traffic(base_rps=base, peak_rps=peak, tokens_per_request=tokens, rise_s=rise)
    found = sizing.traffic(settings, tokens, "spec deploy.traffic")
    assert found
    return found


def replicas(
    chain: list[Demand],
    load: TrafficPlan | None,
    share: float = 1.0,
    utilization: float = 0.7,
    scaled: bool = True,
) -> list[tuple[float, float]]:
    found = sizing.replicas(chain, load, share, utilization, scaled=scaled)
    return [(each.least.value, each.most.value) for each in found]


A100, L4 = Demand("a100", FAST), Demand("l4", SLOW)


@pytest.mark.parametrize(
    ("chain", "load", "options", "expected"),
    [
        # A replica is planned with 0.7 x 20,000 = 14,000 tokens/s. Base 4,800 -> 1, but at least 2. Peak 36,000 -> 3.
        ([L4], (40, 300), {}, [(2, 3)]),
        # Peak 360,000. a100: 360,000 / 63,000 = 5.71 -> 6; base 48,000 -> 1, at least 2. l4: 25.7 -> 26 if there is no
        # a100; with all of them, none is needed.
        ([A100, L4], (400, 3000), {}, [(2, 6), (0, 26)]),
        # a100 is limited to 1 replica: 63,000. Base 96,000 - 63,000 = 33,000 / 14,000 = 2.36 -> 3.
        ([Demand("a100", FAST, limit=1), L4], (800, 3000), {}, [(1, 1), (3, 26)]),
        # The first flavor that a cluster can have has two replicas.
        ([Demand("a100", FAST, limit=0), L4], (40, 300), {}, [(0, 0), (2, 3)]),
        # Settings of the spec and limits of the cluster win.
        ([Demand("l4", SLOW, min_replicas=1, max_replicas=9)], (40, 300), {}, [(1, 9)]),
        ([Demand("l4", SLOW, min_replicas=3, max_replicas=9, limit=2)], (40, 300), {}, [(2, 2)]),
        ([Demand("x", None, min_replicas=2, max_replicas=4)], (40, 300), {}, [(2, 4)]),
        # Without an autoscaler, the replicas serve the peak.
        ([L4], (40, 300), {"scaled": False}, [(3, 3)]),
        # 3 x 0.7 x 20,000 = 42,000 exactly, but 0.7 x 20,000 is 13,999.999... in binary.
        ([L4], (350, 350), {}, [(3, 3)]),
    ],
)
def test_replicas(
    chain: list[Demand], load: tuple[float, float], options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    found = replicas(chain, traffic(*load), **options)
    assert found == expected


@pytest.mark.parametrize(
    ("chain", "share", "load", "value", "formula"),
    [
        ([L4], 1.0, (40, 300), 3, "ceil(36,000 / (0.7 x 20,000))"),
        # 0.25 x 360,000 = 90,000 tokens/s over 63,000 per replica = 1.43 -> 2
        ([A100], 0.25, (400, 3000), 2, "ceil(0.25 x 360,000 / (0.7 x 90,000))"),
        ([A100, L4], 1.0, (400, 3000), 0, "ceil(max(0, 360,000 - 6 x 0.7 x 90,000) / (0.7 x 20,000))"),
        # Flavors without a rate, and those that the cluster cannot have, serve nothing. 360,000 / 63,000 = 5.71 -> 6
        ([Demand("t4", None, min_replicas=2, max_replicas=5), A100], 1.0, (400, 3000), 6, None),
        ([Demand("l4", SLOW, limit=0), A100], 1.0, (400, 3000), 6, "ceil(360,000 / (0.7 x 90,000))"),
    ],
)
def test_the_last_flavor_at_the_peak(
    chain: list[Demand], share: float, load: tuple[float, float], value: int, formula: str | None
) -> None:
    found = sizing.replicas(chain, traffic(*load), share, 0.7, scaled=True)[-1].at_peak
    assert found and (found.value, formula or found.formula) == (value, found.formula)
    assert found.source.startswith("spec deploy.traffic; ")
    assert ("assumed" in found.source) == (chain[-1].rate is SLOW)


@pytest.mark.parametrize(
    ("setting", "load", "share", "rise", "rate", "room", "value", "formula"),
    [
        # Slope 5,200 tokens/s per s. During min(240, 60) s it rises by 312,000, over 90,000 per replica = 3.47 -> 4.
        ("auto", (400, 3000), 1.0, 60, FAST, 8, 4, "ceil(5,200 x min(240, 60) / 90,000)"),
        ("auto", (400, 3000), 0.5, 60, FAST, 8, 2, "ceil(0.5 x 5,200 x min(240, 60) / 90,000)"),
        # The autoscaler can add only one more replica.
        ("auto", (400, 3000), 0.5, 60, FAST, 1, 1, "min(1, ceil(0.5 x 5,200 x min(240, 60) / 90,000))"),
        # (360,000 - 48,000) / 1,200 s = 260 tokens/s per s, for 240 s = 62,400, over 90,000 = 0.69 -> 1.
        ("auto", (400, 3000), 1.0, 1200, FAST, 8, 1, "ceil(260 x min(240, 1,200) / 90,000)"),
        ("none", (40, 300), 1.0, 60, FAST, 8, None, ""),
        (0, (40, 300), 1.0, 60, FAST, 8, None, ""),
        ("auto", (40, 300), 1.0, 60, None, 8, None, ""),
        ("auto", (40, 300), 1.0, 60, FAST, 0, None, ""),
        (3, None, 1.0, 60, None, 0, 3, ""),
    ],
)
def test_the_overflow_covers_the_rise_during_a_cold_start(
    setting: Any,
    load: tuple[float, float] | None,
    share: float,
    rise: float,
    rate: Rate | None,
    room: int,
    value: int | None,
    formula: str,
) -> None:
    found = sizing.overflow(setting, traffic(*load, rise=rise) if load else None, share, rise, COLD, rate, room=room)
    assert (found and (found.value, found.formula)) == (None if value is None else (value, formula))


@pytest.mark.parametrize(
    ("load_s", "longest_s", "value", "formula"),
    [
        # 3 x 41.5 = 124.5 s in steps of 5 s: 24.9 -> 25. A fast start still gets 30 s.
        (41.5, None, 25, "ceil(max(30, 3 x 41.5) / 5)"),
        (2, None, 6, "ceil(max(30, 3 x 2) / 5)"),
        # The server allows 900 s and 3 GB at 100 MB/s, from about 60 s after its own start: 990 / 5 = 198.
        (95, model.longest_start_s(3 * 10**9), 198, "ceil(max(990, 3 x 95) / 5)"),
        (400, 930, 240, "ceil(max(990, 3 x 400) / 5)"),
    ],
)
def test_the_startup_probe_allows_three_times_the_load_and_what_the_server_allows(
    load_s: float, longest_s: float | None, value: int, formula: str
) -> None:
    _, failures = sizing.startup(Figure("load time", load_s, "s", "", "receipt"), longest_s)
    assert (failures.value, failures.formula) == (value, formula)


@pytest.mark.parametrize(
    ("setting", "load", "value", "formula"),
    [
        (150.0, 40.0, 150, ""),
        (None, 40.0, 240, "ceil(max(240, 120 + 40))"),
        (None, 900.5, 1021, "ceil(max(240, 120 + 900.5))"),
    ],
)
def test_a_cold_start_is_set_or_has_the_node_and_the_load(
    setting: float | None, load: float, value: int, formula: str
) -> None:
    found = sizing.cold_start(setting, Figure("load time", load, "s", "", "a source"))
    assert (found.value, found.formula) == (value, formula)


@pytest.mark.parametrize(
    ("receipt", "downloads", "value"),
    [
        (41.5, False, 41.5),
        # The receipt may be of a run with the model in its cache; the pods download it first.
        (41.5, True, 120),
        (200.0, True, 200),
        (None, False, 120),
        (None, True, 120),
    ],
)
def test_a_load_time_is_measured_and_leaves_time_for_a_download(
    receipt: float | None, downloads: bool, value: float
) -> None:
    found = sizing.load_s(measured(load_s=receipt) if receipt else None, downloads=downloads)
    assert found.value == value
    assert ("assumed" in found.source) == (receipt is None)


def measured(**values: Any) -> Rate:
    return Rate(1.0, True, "", seal="01234567", **values)


def test_the_grace_period_covers_the_longest_measured_response() -> None:
    # Longest 41 s: a drain of 82 s instead of 25; 5 + 1 + 82 + 5.
    drain = sizing.drain_s(25, measured(longest_s=41.0))
    assert drain.value == 82
    assert sizing.grace_s(sizing.pre_stop_s(), 1.0, drain).value == 93
    assert sizing.drain_s(25, measured(longest_s=0.4)).value == 25


def test_memory_and_cores_are_measured_or_called_assumed() -> None:
    rate = measured(memory_bytes=3_900_000_000, cores=2.4)
    # 1.25 x 3.9e9 = 4.875e9 = 4,649.2 MiB -> 4,650 MiB
    assert sizing.memory_bytes(rate, None, None).value == 4650 * 1024**2
    assert sizing.cores(rate).value == sizing.cores(rate, 1).value == 3  # 2.88
    # 200,000,000 + 4 GiB = 4,494,967,296 = 4,286.7 MiB -> 4,287 MiB
    assumed = sizing.memory_bytes(None, 200_000_000, None)
    assert (assumed.value, "assumed" in assumed.source) == (4287 * 1024**2, True)
    unknown = sizing.memory_bytes(None, None, None)
    assert unknown.value == 4 * 1024**3
    assert "unknown" in unknown.formula and "without the weights" in unknown.source
    # A pod of 3 cores, also with a relay or a load generator, fits the 4 vCPUs of a g6.xlarge.
    assert (sizing.cores(None).value, "assumed" in sizing.cores(None).source) == (3, True)
    assert (sizing.cores(None, 0.1).value, sizing.cores(None, 0.1).formula) == (2.9, "3 - 0.1")
    assert sizing.cores(None, api_processes=3).value == 5
    assert sizing.cores(None, 0.1, 2, api_processes=3).value == 7.9


def test_the_memory_of_a_generator_on_a_cpu_has_its_kv_cache() -> None:
    image = f"registry.example.com/chat{plans.DIGEST}"
    spec = plans.generate(flavors=[{"hardware": "cpu", "tokens_per_second": 300, "image": image}])

    def gibibytes(kv_cache: str | None) -> float:
        serve = spec.serve.model_copy(update={"kv_cache": kv_cache})
        (flavor,) = plans.plan(spec.model_copy(update={"serve": serve})).models[0].flavors
        return flavor.memory_bytes.value / 1024**3

    assert gibibytes("3GiB") - gibibytes("1GiB") == 2
    assert gibibytes(None) - gibibytes("1GiB") == 3, "4 GiB is the default on a CPU"


rates = st.floats(100, 1e6)
loads = st.floats(0.1, 10_000)


@given(st.lists(rates, min_size=1, max_size=4), loads, loads, st.floats(0.05, 1), st.floats(0.3, 1))
def test_without_limits_the_maxima_always_serve_the_peak(
    speeds: list[float], first: float, second: float, share: float, utilization: float
) -> None:
    chain = [Demand(str(index), Rate(speed, True, "")) for index, speed in enumerate(speeds)]
    load = traffic(min(first, second), max(first, second))
    counts = replicas(chain, load, share, utilization)
    served = sum(most * utilization * speed for (_, most), speed in zip(counts, speeds, strict=True))
    assert served >= load.peak.value * share * (1 - 1e-6)
    assert all(0 <= least <= most for least, most in counts)
    # The first flavor has no more than it needs.
    needed = load.peak.value * share / (utilization * speeds[0])
    assert counts[0][1] <= max(2, math.ceil(needed) if needed > 1e-6 else 1)
