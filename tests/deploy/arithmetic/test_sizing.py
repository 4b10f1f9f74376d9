"""The arithmetic of a deployment. Expected numbers are worked out by hand in the comments."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.config.deploy_spec import Traffic
from inferctl.deploy import sizing
from inferctl.deploy.figure import Figure
from inferctl.deploy.plan import Rate, TrafficPlan
from inferctl.deploy.sizing import Demand
from inferctl.estimate import forecast
from inferctl.facts import catalog
from inferctl.facts.catalog import hardware_profiles
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
    lowest: int = 0,
) -> list[tuple[float, float]]:
    found = sizing.replicas(chain, load, share, utilization, scaled=scaled, lowest=lowest)
    return [(each.least.value, each.most.value) for each in found]


def test_traffic_is_requests_times_tokens_and_the_slope_is_their_rise() -> None:
    found = traffic(40, 300)
    # 40 x 120, 300 x 120, (36,000 - 4,800) / 60
    assert (found.base.value, found.peak.value, found.slope.value) == (4_800, 36_000, 520)
    assert found.slope.formula == "(36,000 - 4,800) / 60"


def test_a_flavor_serves_the_peak_with_a_share_of_its_rate() -> None:
    # A replica is planned with 0.7 x 20,000 = 14,000 tokens/s. Base 4,800 -> 1, but at least 2. Peak 36,000 / 14,000 =
    # 2.57 -> 3.
    (found,) = sizing.replicas([Demand("l4", SLOW)], traffic(40, 300), 1.0, 0.7, scaled=True, lowest=0)
    assert (found.least.value, found.most.value) == (2, 3)
    assert found.at_peak
    assert found.at_peak.formula == "ceil(36,000 / (0.7 x 20,000))"
    assert found.at_peak.source == "spec deploy.traffic; rate assumed in the spec"


def test_a_cluster_gets_its_share() -> None:
    # 0.25 x 360,000 = 90,000 tokens/s over 63,000 per replica = 1.43 -> 2
    (found,) = sizing.replicas([Demand("a100", FAST)], traffic(400, 3000), 0.25, 0.7, scaled=True, lowest=0)
    assert found.at_peak
    assert (found.at_peak.value, found.at_peak.formula) == (2, "ceil(0.25 x 360,000 / (0.7 x 90,000))")
    assert found.at_peak.source == "spec deploy.traffic; receipt 01234567"


def test_a_later_flavor_can_stand_in_for_all_earlier_ones() -> None:
    # Peak 360,000. a100: 360,000 / 63,000 = 5.71 -> 6; base 48,000 -> 1, at least 2. l4: 360,000 / 14,000 = 25.7 -> 26
    # if there is no a100; with all of them, none is needed.
    chain = [Demand("a100", FAST), Demand("l4", SLOW)]
    assert replicas(chain, traffic(400, 3000)) == [(2, 6), (0, 26)]
    _, second = sizing.replicas(chain, traffic(400, 3000), 1.0, 0.7, scaled=True, lowest=0)
    assert second.at_peak
    assert (second.at_peak.value, second.at_peak.formula) == (
        0,
        "ceil(max(0, 360,000 - 6 x 0.7 x 90,000) / (0.7 x 20,000))",
    )


def test_earlier_flavors_without_a_rate_or_replicas_serve_nothing() -> None:
    # Peak 360,000 over 63,000 per a100 = 5.71 -> 6, whatever runs before it without a rate. Base 48,000 -> 1.
    unrated = Demand("t4", None, min_replicas=2, max_replicas=5)
    found = sizing.replicas([unrated, Demand("a100", FAST)], traffic(400, 3000), 1.0, 0.7, scaled=True, lowest=0)
    assert [each.at_peak.value if each.at_peak else None for each in found] == [None, 6]
    # A flavor that the cluster cannot have is not in the formula.
    absent = Demand("l4", SLOW, limit=0)
    _, second = sizing.replicas([absent, Demand("a100", FAST)], traffic(400, 3000), 1.0, 0.7, scaled=True, lowest=0)
    assert second.at_peak and second.at_peak.formula == "ceil(360,000 / (0.7 x 90,000))"


def test_a_later_flavor_runs_always_if_the_earlier_ones_cannot_serve_the_base() -> None:
    # a100 is limited to 1 replica: 63,000. Base 96,000 - 63,000 = 33,000 / 14,000 = 2.36 -> 3.
    chain = [Demand("a100", FAST, limit=1), Demand("l4", SLOW)]
    assert replicas(chain, traffic(800, 3000))[0] == (1, 1)
    assert replicas(chain, traffic(800, 3000))[1][0] == 3


def test_the_first_flavor_that_a_cluster_can_have_has_two_replicas() -> None:
    chain = [Demand("a100", FAST, limit=0), Demand("l4", SLOW)]
    assert replicas(chain, traffic(40, 300)) == [(0, 0), (2, 3)]


def test_settings_of_the_spec_and_limits_of_the_cluster_win() -> None:
    load = traffic(40, 300)
    assert replicas([Demand("l4", SLOW, min_replicas=1, max_replicas=9)], load) == [(1, 9)]
    assert replicas([Demand("l4", SLOW, min_replicas=3, max_replicas=9, limit=2)], load) == [(2, 2)]
    assert replicas([Demand("x", None, min_replicas=2, max_replicas=4)], load) == [(2, 4)]
    assert replicas([Demand("l4", SLOW, min_replicas=0, max_replicas=4)], load, lowest=1) == [(1, 4)]


def test_without_an_autoscaler_the_replicas_serve_the_peak() -> None:
    assert replicas([Demand("l4", SLOW)], traffic(40, 300), scaled=False) == [(3, 3)]


def test_rounding_errors_add_no_replica() -> None:
    # 3 x 0.7 x 20,000 = 42,000 exactly, but 0.7 x 20,000 is 13,999.999... in binary.
    assert replicas([Demand("l4", SLOW)], traffic(350, 350, tokens=120))[0][1] == 3


def test_the_overflow_covers_the_rise_during_a_cold_start() -> None:
    # Slope 5,200 tokens/s per s. During min(240, 60) s it rises by 312,000, over 90,000 per replica = 3.47 -> 4.
    load = traffic(400, 3000)
    found = sizing.overflow("auto", load, 1.0, 60, COLD, FAST, room=8)
    assert found
    assert (found.value, found.formula) == (4, "ceil(5,200 x min(240, 60) / 90,000)")
    # Half the traffic: 1.73 -> 2. The autoscaler can add only one more replica.
    half = sizing.overflow("auto", load, 0.5, 60, COLD, FAST, room=8)
    assert half
    assert half.value == 2
    bounded = sizing.overflow("auto", load, 0.5, 60, COLD, FAST, room=1)
    assert bounded
    assert (bounded.value, bounded.formula) == (1, "min(1, ceil(0.5 x 5,200 x min(240, 60) / 90,000))")


def test_a_slow_rise_needs_only_the_part_within_the_cold_start() -> None:
    # (360,000 - 48,000) / 1,200 s = 260 tokens/s per s, for 240 s = 62,400, over 90,000 = 0.69 -> 1.
    found = sizing.overflow("auto", traffic(400, 3000, rise=1200), 1.0, 1200, COLD, FAST, room=8)
    assert found
    assert found.value == 1


def test_the_overflow_can_be_a_number_or_none() -> None:
    load = traffic(40, 300)
    assert sizing.overflow("none", load, 1.0, 60, COLD, FAST, room=8) is None
    assert sizing.overflow(0, load, 1.0, 60, COLD, FAST, room=8) is None
    assert sizing.overflow("auto", load, 1.0, 60, COLD, None, room=8) is None
    assert sizing.overflow("auto", load, 1.0, 60, COLD, FAST, room=0) is None
    found = sizing.overflow(3, None, 1.0, 60, COLD, None, room=0)
    assert found
    assert found.value == 3


def test_the_startup_probe_allows_three_times_the_load() -> None:
    # 3 x 41.5 = 124.5 s in steps of 5 s: 24.9 -> 25. A fast start still gets 30 s.
    _, failures = sizing.startup(Figure("load time", 41.5, "s", "", "receipt"))
    assert (failures.value, failures.formula) == (25, "ceil(max(30, 3 x 41.5) / 5)")
    _, failures = sizing.startup(Figure("load time", 2, "s", "", "receipt"))
    assert failures.value == 6


def test_the_startup_probe_does_not_end_a_start_before_the_server_does() -> None:
    # The server allows 900 s and 3 GB at 100 MB/s, from about 60 s after its own start: 990 / 5 = 198.
    _, failures = sizing.startup(Figure("load time", 95, "s", "", "receipt"), model.longest_start_s(3 * 10**9))
    assert (failures.value, failures.formula) == (198, "ceil(max(990, 3 x 95) / 5)")
    assert "the server ends a start itself after 930 s" in failures.source
    _, failures = sizing.startup(Figure("load time", 400, "s", "", "receipt"), 930)
    assert failures.value == 240


def test_the_load_time_of_the_spec_wins_over_the_receipt() -> None:
    rate = Rate(1.0, True, "", load_s=41.5, seal="01234567")
    assert sizing.load_s(10, 20, rate).value == 10
    assert sizing.load_s(None, 20, rate).value == 20
    assert (sizing.load_s(None, None, rate).value, sizing.load_s(None, None, rate).source) == (41.5, "receipt 01234567")
    assumed = sizing.load_s(None, None, None)
    assert (assumed.value, "assumed" in assumed.source) == (120, True)


def test_the_grace_period_covers_the_longest_measured_response() -> None:
    # Longest 41 s: a drain of 82 s instead of 25; 5 + 1 + 82 + 5.
    drain = sizing.drain_s(25, Rate(1.0, True, "", longest_s=41.0, seal="01234567"))
    assert drain.value == 82
    assert sizing.grace_s(sizing.pre_stop_s(), 1.0, drain).value == 93
    assert sizing.drain_s(25, Rate(1.0, True, "", longest_s=0.4, seal="01234567")).value == 25


def test_memory_and_cores_are_measured_or_called_assumed() -> None:
    rate = Rate(1.0, True, "", memory_bytes=3_900_000_000, cores=2.4, seal="01234567")
    # 1.25 x 3.9e9 = 4.875e9 = 4,649.2 MiB -> 4,650 MiB
    assert sizing.memory_bytes(rate, None, None).value == 4650 * 1024**2
    assert sizing.cores(rate).value == 3  # 2.88
    # 200,000,000 + 4 GiB = 4,494,967,296 = 4,286.7 MiB -> 4,287 MiB
    assumed = sizing.memory_bytes(None, 200_000_000, None)
    assert (assumed.value, "assumed" in assumed.source) == (4287 * 1024**2, True)
    # A pod of 3 cores, also with a worker or a load generator, fits the 4 vCPUs of a g6.xlarge.
    assert (sizing.cores(None).value, "assumed" in sizing.cores(None).source) == (3, True)
    assert (sizing.cores(None, 0.1).value, sizing.cores(None, 0.1).formula) == (2.9, "3 - 0.1")
    assert sizing.cores(rate, 1).value == 3


def test_the_memory_of_a_generator_on_a_cpu_has_its_kv_cache() -> None:
    image = f"registry.example.com/chat{plans.DIGEST}"
    spec = plans.generate(flavors=[{"hardware": "cpu", "tokens_per_second": 300, "image": image}])

    def gibibytes(kv_cache: str | None) -> float:
        serve = spec.serve.model_copy(update={"kv_cache": kv_cache})
        (flavor,) = plans.plan(spec.model_copy(update={"serve": serve})).models[0].flavors
        return flavor.memory_bytes.value / 1024**3

    assert gibibytes("3GiB") - gibibytes("1GiB") == 2
    assert gibibytes(None) - gibibytes("1GiB") == 3, "4 GiB is the default on a CPU"


def test_a_slice_costs_its_part_of_the_gpu_for_730_hours() -> None:
    half = catalog.hardware("a100-40gb-mig-3g.20gb")
    found = sizing.cost("cost", 3, half, "aws", gpus=1, shared_by=1)
    assert found
    # 3 x 2.745 / 2 x 730 = 3,005.775 (rounded to cents, half to even in binary)
    assert found.value == pytest.approx(3_005.78, abs=0.011)
    assert found.formula == "3 x 2.745 USD/h / 2 x 730 h"
    assert "list price of p4d.24xlarge" in found.source
    # Two L4 for each replica: 2 x 2 x 0.8048 x 730 = 2,350.016
    two = sizing.cost("cost", 2, catalog.hardware("l4"), "aws", gpus=2, shared_by=1)
    assert two
    assert (two.value, two.formula) == (2350.02, "2 x 2 x 0.8048 USD/h x 730 h")
    # Four pods on one T4: 4 x 0.526 / 4 x 730 = 383.98
    shared = sizing.cost("cost", 4, catalog.hardware("t4"), "aws", gpus=1, shared_by=4)
    assert shared
    assert shared.value == 383.98


def test_an_unknown_price_is_none_and_never_that_of_another_cloud() -> None:
    assert sizing.cost("cost", 1, catalog.hardware("l4"), "gcp", gpus=1, shared_by=1) is None
    assert sizing.cost("cost", 1, catalog.hardware("a10"), "aws", gpus=1, shared_by=1) is None


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


@given(rates, loads, loads, loads)
def test_more_traffic_never_needs_fewer_replicas(speed: float, base: float, peak: float, more: float) -> None:
    low, high = min(base, peak), max(base, peak)
    chain = [Demand("x", Rate(speed, True, ""))]
    assert replicas(chain, traffic(low, high))[0][1] <= replicas(chain, traffic(low, high + more))[0][1]


SLICES = [key for key, part in hardware_profiles().items() if part.mig]


@pytest.mark.parametrize("key", SLICES)
def test_a_slice_has_one_price_in_deploy_and_estimate(key: str) -> None:
    part = hardware_profiles()[key]
    assert part.mig
    whole = hardware_profiles()[part.mig.parent]
    assert forecast.prices(part) or not whole.prices
    for price in forecast.prices(part):
        found = sizing.cost("a month", 1, part, price["provider"], gpus=1, shared_by=1)
        assert found and found.value == pytest.approx(price["usd_per_hour"] * sizing.HOURS_PER_MONTH, abs=0.01)
        # All slices that fit cost no more than the GPU, and what does not fit another one is paid.
        (full,) = (each.usd_per_hour for each in whole.prices if each.provider == price["provider"])
        assert price["usd_per_hour"] * part.mig.at_most == pytest.approx(full)
