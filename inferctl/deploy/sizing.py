"""The arithmetic of a deployment: replicas, spare capacity, probes and grace. Pure functions that return figures.

A replica is planned with a share of its rate (`utilization`). Flavors form a chain in order of preference: each one
serves what the earlier ones, at their maximum, leave over. Its own maximum is for the case that none of them is
available.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.config.deploy_spec import Traffic
from inferctl.config.spec import Spec
from inferctl.core.sizes import size
from inferctl.deploy.figure import Figure, shown
from inferctl.deploy.plan import Rate, TrafficPlan

# One replica can be lost with its node while the other one serves.
LEAST_REPLICAS = 2
# A start may take three times as long as the measured one: a cold disk, a busy node.
_START_FACTOR = 3
_PROBE_PERIOD_S = 5
_LEAST_START_S = 30
# Of a server of generation, before it starts vLLM.
_BEFORE_ENGINE_S = 60
# Endpoints and kube-proxy need seconds to forget a pod.
_PRE_STOP_S = 5
_MARGIN_S = 5
_ASSUMED_LOAD_S = 120
# Until a cloud has added a node that has pulled the image; and the least of a whole cold start.
_ASSUMED_NODE_S, _LEAST_COLD_START_S = 120, 240
# Of the 4 vCPUs of the smallest machines with a GPU (g6.xlarge, g4dn.xlarge), the node itself needs a part.
_ASSUMED_POD_CORES = 3
# With less, the relay needs ten seconds for its imports, and a server waits for its keys.
_RELAY_CORES, _RELAY_CORES_WITH_ACCESS = 0.1, 0.25
_MIB = 1024**2
_ASSUMED_HOST_BYTES = 4 * 1024**3
# The longest drain that the server accepts.
_LONGEST_DRAIN_S = 86_400


@dataclass(frozen=True)
class Demand:
    """What the spec says about one flavor in one cluster. `limit`: the most replicas that the cluster can have."""

    label: str
    rate: Rate | None
    min_replicas: int | None = None
    max_replicas: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Replicas:
    """The limits of the autoscaler of one flavor, and what the traffic needs. None without a rate or traffic."""

    least: Figure
    most: Figure
    at_base: Figure | None
    at_peak: Figure | None


def traffic(settings: Traffic, tokens: float, tokens_source: str) -> TrafficPlan | None:
    """Return the traffic in tokens per second; None if the spec has none."""
    base, peak = settings.base_rps, settings.peak_rps
    if base is None or peak is None:
        return None
    own = "spec deploy.traffic"
    source = own if tokens_source == own else f"{own}; tokens per request from {tokens_source}"
    low, high = base * tokens, peak * tokens
    return TrafficPlan(
        Figure("base traffic", low, "tokens/s", f"{shown(base)} x {shown(tokens)}", source),
        Figure("peak traffic", high, "tokens/s", f"{shown(peak)} x {shown(tokens)}", source),
        Figure(
            "slope of the rise",
            (high - low) / settings.rise_s,
            "tokens/s per s",
            f"({shown(high)} - {shown(low)}) / {shown(settings.rise_s)}",
            "spec deploy.traffic",
        ),
        Figure("tokens per request", tokens, "tokens", "", tokens_source),
    )


def replicas(
    chain: Sequence[Demand],
    traffic: TrafficPlan | None,
    share: float,
    utilization: float,
    *,
    scaled: bool,
) -> list[Replicas]:
    """Return the replicas of each flavor in one cluster.

    `share`: of the traffic. `scaled`: whether an autoscaler adds replicas. If not, minimum and maximum are equal.
    A flavor without a rate serves nothing in this arithmetic, and needs its own `min_replicas` and `max_replicas`.
    """
    found: list[Replicas] = []
    base, peak = (traffic.base, traffic.peak) if traffic else (None, None)
    first = next((index for index, each in enumerate(chain) if each.limit != 0 and each.max_replicas != 0), 0)
    for index, demand in enumerate(chain):
        earlier = list(zip(chain[:index], found, strict=True))
        at_base = _needed("base", demand, base, share, utilization, _at_most(earlier))
        at_peak = _needed("peak", demand, peak, share, utilization, _at_most(earlier))
        # If the hardware of all earlier flavors has run out, this one serves the whole peak.
        stand_in = _needed("peak", demand, peak, share, utilization, [])
        least = _least(demand, at_base if scaled else at_peak, first=index == first)
        most = _limited(_most(demand, stand_in, least) if scaled else _equal(demand, least), demand.limit)
        if least.value > most.value:
            least = Figure(least.name, most.value, "replicas", f"min({most.value}, {least.value})", most.source)
        found.append(Replicas(least, most, at_base, at_peak))
    return found


def _at_most(earlier: list[tuple[Demand, Replicas]]) -> list[tuple[int, Rate]]:
    return [(int(each.most.value), demand.rate) for demand, each in earlier if demand.rate and each.most.value]


def _needed(
    when: str,
    demand: Demand,
    demand_tps: Figure | None,
    share: float,
    utilization: float,
    earlier: list[tuple[int, Rate]],
) -> Figure | None:
    if demand.rate is None or demand_tps is None:
        return None
    rate = demand.rate.tokens_per_second
    offered = demand_tps.value * share
    served = sum(count * utilization * each.tokens_per_second for count, each in earlier)
    value = ceil(max(0.0, offered - served) / (utilization * rate))
    total = shown(demand_tps.value) if share == 1 else f"{shown(share)} x {shown(demand_tps.value)}"
    left = total
    for count, each in earlier:
        left += f" - {count} x {shown(utilization)} x {shown(each.tokens_per_second)}"
    left = f"max(0, {left})" if earlier else left
    formula = f"ceil({left} / ({shown(utilization)} x {shown(rate)}))"
    return Figure(f"replicas at {when}", value, "replicas", formula, f"spec deploy.traffic; {demand.rate.origin}")


def _least(demand: Demand, needed: Figure | None, *, first: bool) -> Figure:
    name = "minimum"
    if demand.min_replicas is not None:
        return Figure(name, demand.min_replicas, "replicas", "", "spec min_replicas")
    floor = LEAST_REPLICAS if first else 0
    if needed is None:
        source = "own choice: one can be lost with its node" if first else "none before the traffic needs it"
        return Figure(name, floor, "replicas", "", source)
    return _at_least_this(name, floor, needed)


def _most(demand: Demand, needed: Figure | None, least: Figure) -> Figure:
    name = "maximum"
    if demand.max_replicas is not None:
        return Figure(name, demand.max_replicas, "replicas", "", "spec max_replicas")
    if needed is not None:
        return _at_least_this(name, int(least.value), needed)
    return Figure(name, least.value, "replicas", "", f"{least.source}; no traffic or rate to size it from")


def _at_least_this(name: str, floor: int, needed: Figure) -> Figure:
    formula = f"max({floor}, {needed.formula})" if floor else needed.formula
    return Figure(name, max(floor, needed.value), "replicas", formula, needed.source)


def _limited(most: Figure, limit: int | None) -> Figure:
    """Return the maximum, or what the cluster can have if that is less."""
    if limit is None or limit >= most.value:
        return most
    return Figure(most.name, limit, "replicas", f"min({limit}, {most.value})", "max_replicas of the clusters file")


def _equal(demand: Demand, least: Figure) -> Figure:
    """Return the maximum without an autoscaler: the minimum, or what the spec allows if that is less."""
    if demand.max_replicas is not None and demand.max_replicas < least.value:
        formula = f"min({demand.max_replicas}, {least.value})"
        return Figure("maximum", demand.max_replicas, "replicas", formula, "spec max_replicas")
    return Figure("maximum", least.value, "replicas", "equal to the minimum", "scaling: none")


def overflow(
    setting: str | int,
    traffic: TrafficPlan | None,
    share: float,
    rise_s: float,
    cold_start: Figure,
    rate: Rate | None,
    room: int,
) -> Figure | None:
    """Return the replicas that must find a node at once; None if there are none.

    While a new node starts, the traffic keeps rising. This part of the rise needs nodes that are alive and empty. The
    rise ends after `rise_s`. `room`: replicas that the autoscaler can add, between its minimum and its maximum.
    """
    if isinstance(setting, int):
        return Figure("overflow", setting, "replicas", "", "spec deploy.overflow") if setting else None
    if setting == "none" or traffic is None or rate is None:
        return None
    seconds = min(float(cold_start.value), rise_s)
    needed = ceil(traffic.slope.value * share * seconds / rate.tokens_per_second)
    slope = shown(traffic.slope.value) if share == 1 else f"{shown(share)} x {shown(traffic.slope.value)}"
    during = f"min({shown(cold_start.value)}, {shown(rise_s)})"
    formula = f"ceil({slope} x {during} / {shown(rate.tokens_per_second)})"
    if room < needed:
        formula = f"min({room}, {formula})"
    source = f"spec deploy.traffic; cold start from {cold_start.source}; {rate.origin}"
    value = min(room, needed)
    return Figure("overflow", value, "replicas", formula, source) if value > 0 else None


def cold_start(setting: float | None, load_time: Figure) -> Figure:
    """Return the seconds until a replica on a new node is ready: what is set, else assumed.

    A cold start that is too short leaves the rise of the traffic without nodes.
    """
    name = "cold start"
    if setting is not None:
        return Figure(name, setting, "s", "", "spec deploy.cold_start_s")
    value = max(_LEAST_COLD_START_S, _ASSUMED_NODE_S + load_time.value)
    formula = f"ceil(max({_LEAST_COLD_START_S}, {_ASSUMED_NODE_S} + {shown(load_time.value)}))"
    source = f"node and image (assumed), load time ({load_time.source})"
    return Figure(name, ceil(value), "s", formula, source)


def load_s(rate: Rate | None, *, downloads: bool = False, models: int = 1) -> Figure:
    """Return the seconds from the start of a container until it is ready.

    `downloads`: whether the container downloads its weights. A receipt may be of a run that had them in its cache.
    `models`: they start one after the other.
    """
    name = "load time"
    if not (rate and rate.load_s):
        formula = f"{models} x {_ASSUMED_LOAD_S}" if models > 1 else ""
        return Figure(name, models * _ASSUMED_LOAD_S, "s", formula, "assumed: no receipt")
    seconds = round(rate.load_s, 1)
    if downloads:
        formula, source = f"max({_ASSUMED_LOAD_S}, {shown(seconds)})", f"at least that with a download; {rate.origin}"
        return Figure(name, max(_ASSUMED_LOAD_S, seconds), "s", formula, source)
    return Figure(name, seconds, "s", "longest start of its runs", rate.origin)


def startup(load_time: Figure, longest_s: float | None = None) -> tuple[Figure, Figure]:
    """Return the period of the startup probe and the failures that it allows.

    `longest_s`: when the server itself ends a start and reports the reason. A probe that kills it earlier hides that.
    """
    least, source = float(_LEAST_START_S), f"load time: {load_time.source}"
    if longest_s is not None:
        least = math.ceil(longest_s) + _BEFORE_ENGINE_S
        source += f"; the server ends a start itself after {shown(math.ceil(longest_s))} s"
    failures = ceil(max(least, _START_FACTOR * float(load_time.value)) / _PROBE_PERIOD_S)
    formula = f"ceil(max({shown(least)}, {_START_FACTOR} x {shown(load_time.value)}) / {_PROBE_PERIOD_S})"
    return (
        Figure("period of the startup probe", _PROBE_PERIOD_S, "s", "", "own choice"),
        Figure("failures of the startup probe", failures, "probes", formula, source),
    )


def pre_stop_s() -> Figure:
    """Return the seconds before SIGTERM in which routers stop sending requests."""
    return Figure("preStop", _PRE_STOP_S, "s", "", "own choice: time until routers notice")


def drain_s(setting: float, rate: Rate | None) -> Figure:
    """Return the seconds that accepted requests get to finish: the setting, or twice the longest measured response."""
    if rate and rate.longest_s and 2 * rate.longest_s > setting:
        formula = f"ceil(2 x {shown(rate.longest_s)})"
        source = f"longest response of {rate.origin}; more than serve.drain_seconds"
        return Figure("drain", min(_LONGEST_DRAIN_S, ceil(2 * rate.longest_s)), "s", formula, source)
    return Figure("drain", setting, "s", "", "spec serve.drain_seconds")


def grace_s(pre_stop: Figure, grace_seconds: float, drain: Figure) -> Figure:
    """Return the seconds between the end of a pod's service and SIGKILL."""
    parts = (pre_stop.value, grace_seconds, drain.value, _MARGIN_S)
    source = f"preStop + serve.grace_seconds + drain ({drain.source}) + margin"
    return Figure("grace period", ceil(sum(parts)), "s", " + ".join(map(shown, parts)), source)


def memory_bytes(rate: Rate | None, weights: int | None, model: int | None, *, cache: int = 0, gpus: int = 1) -> Figure:
    """Return the host memory of a server.

    `weights`: their bytes on each GPU. `model`: all estimated bytes on a CPU, with the KV cache; None on a GPU.
    `cache`: most bytes of cached vectors, which `inferctl bench` switches off, so no receipt has them. `gpus`: each has
    a process of its own.
    """
    added, also = (f" + {size(cache, 1)}", "; cache.size") if cache else ("", "")
    if rate and rate.memory_bytes:
        value = ceil((rate.memory_bytes * 1.25 + cache) / _MIB) * _MIB
        formula = f"1.25 x {size(rate.memory_bytes, 1)}{added}"
        return Figure("host memory", value, "bytes", formula, f"peak of {rate.origin}{also}")
    known = model if model is not None else weights
    value = ceil((gpus * ((known or 0) + _ASSUMED_HOST_BYTES) + cache) / _MIB) * _MIB
    formula = f"{size(known, 1) if known else 'unknown weights'} + {size(_ASSUMED_HOST_BYTES, 1)}"
    formula = f"{gpus} x ({formula})" if gpus > 1 else formula
    parts = "weights and 4 GiB" if known else "4 GiB without the weights"
    source = f"assumed: {parts}{' per GPU' if gpus > 1 else ''}, no receipt with memory{also}"
    return Figure("host memory", value, "bytes", formula + added, source)


def cores(rate: Rate | None, other_cores: float = 0.0, gpus: int = 1, api_processes: int = 1) -> Figure:
    """Return the CPU cores of a server.

    `other_cores`: cores of the other containers in its pod. `gpus`: of the pod. `api_processes`: of the server; the
    first one is in the assumed cores.
    """
    if rate and rate.cores:
        return Figure("cores", max(1, ceil(1.2 * rate.cores)), "cores", f"ceil(1.2 x {shown(rate.cores)})", rate.origin)
    more = api_processes - 1
    plain = [f"{_ASSUMED_POD_CORES}"] if other_cores or more else []
    terms = [f"{gpus} x {_ASSUMED_POD_CORES}"] if gpus > 1 else plain
    terms += [f"+ {more} for more API processes"] if more else []
    formula = " ".join([*terms, *([f"- {shown(other_cores)}"] if other_cores else [])])
    source = f"assumed: a pod fits 4 vCPUs{' per GPU' if gpus > 1 else ''}; no receipt with cores"
    return Figure("cores", round(gpus * _ASSUMED_POD_CORES + more - other_cores, 3), "cores", formula, source)


def relay_cores(spec: Spec) -> float:
    """Return the cores of the relay next to a server, 0 without one."""
    if spec.access.has_relay:
        return _RELAY_CORES_WITH_ACCESS
    return _RELAY_CORES if spec.metering.mode != "off" else 0.0


def ceil(value: float) -> int:
    """Return the least integer that is not below `value`, with room for rounding errors of its computation."""
    return math.ceil(value - 1e-9 * max(1.0, abs(value)))
