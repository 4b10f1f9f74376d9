"""How busy the processes of an inferctl server were during a load, from two scrapes of its `/metrics`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping

from inferctl.bench.load.http_json import Info, ServerAccess, get
from inferctl.core.errors import InferctlError

# In the order of the labels in an exposition of Prometheus. The last metric differs after a restart, and between the
# replicas behind one address.
_SAMPLE = re.compile(
    r'^inferctl_(?:thread_seconds_total\{process="(\w+)",state="(\w+)",thread="(\w+)"\}'
    r"|(batch_duration_seconds_sum|tokens_created|engine_restarts)(?:\{.*\})?"
    r'|(engine_flops_total|matrix_flops_per_second)(?:\{(?:.*model="([^"]*)")?.*\})?) (\S+)$',
    re.MULTILINE,
)
_TIMEOUT_S = 2.0
# The last scrape is in this part of the window. Progress is reported twice as often.
_LAST_S = 1.0
# Less time between the scrapes would say little.
_MIN_S = 1.0


class ServerActivity:
    """Scrapes the server at `url` at both ends of the measured window. `info`: its `GET /info`."""

    def __init__(self, url: str, info: Info, access: ServerAccess) -> None:
        self._url, self._info, self._access = url, info, access
        self._samples: list[tuple[int, dict[str, float]]] = []

    def follow(self, phase: str, left_s: float) -> None:
        """Scrape, if this moment of a load is at an end of the window. `left_s`: the rest of the window in seconds."""
        if phase != "measure" or "inferctl" not in self._info or (self._samples and left_s > _LAST_S):
            return
        with contextlib.suppress(InferctlError, ValueError):
            text = get(f"{self._url}/metrics", _TIMEOUT_S, self._access).decode()
            self._samples.append((time.monotonic_ns(), read(text)))

    def between(self, start_ns: int, end_ns: int) -> dict[str, float]:
        """Return shares of the time between two times (CLOCK_MONOTONIC), in percent; empty if the scrapes show none.

        `api_busy_percent` and `backend_busy_percent`: the event loop did not sleep. `tokenizer_busy_percent`: threads
        of API processes that tokenize did not. `*_waiting_percent`: the part of it in which they waited for a core.
        `engine_busy_percent`: engines computed. All are means: over API processes, or what engines can run at a time.
        `matrix_share_percent`: the floating-point operations of batches, of those that matrix products could have done.
        `engine_restarts`: how many engines crashed and restarted; only if any did.
        """
        inside = [sample for sample in self._samples if start_ns <= sample[0] <= end_ns]
        if len(inside) < 2:
            return {}
        (first_ns, first), (last_ns, last) = inside[0], inside[-1]
        seconds = (last_ns - first_ns) / 1e9
        if seconds < _MIN_S or first.pop("tokens_created", None) != last.pop("tokens_created", None):
            return {}
        return {key: round(value, 1) for key, value in self._shares(seconds, first, last).items()}

    def _shares(self, seconds: float, first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
        used = {key: 100 * (last[key] - first[key]) / seconds for key in first.keys() & last.keys()}
        processes, shares = (self._info.get("api_processes") or {}).get("count", 1), {}
        threads = {"api": "api event_loop", "tokenizer": "api tokenizer", "backend": "backend event_loop"}
        for name, thread in threads.items():
            if f"{thread} running" in used:
                count = 1 if name == "backend" else processes
                waiting = used[f"{thread} waiting"] / count
                shares[f"{name}_busy_percent"] = min(100.0, used[f"{thread} running"] / count + waiting)
                shares[f"{name}_waiting_percent"] = waiting
        engines = (self._info.get("engines") or {}).get("count")
        if engines and "batch_duration_seconds_sum" in used:
            batches = engines * self._info.get("parallel_batches", 1)
            shares["engine_busy_percent"] = min(100.0, used["batch_duration_seconds_sum"] / batches)
        head = "matrix_flops_per_second "
        if rates := {key.removeprefix(head): rate for key, rate in last.items() if key.startswith(head)}:
            parts = (used.get(f"engine_flops_total {model}", 0.0) / rate for model, rate in rates.items())
            shares["matrix_share_percent"] = sum(parts)
        if restarts := last.get("engine_restarts", 0.0) - first.get("engine_restarts", 0.0):
            shares["engine_restarts"] = restarts
        return shares


def read(text: str) -> dict[str, float]:
    """Return the seconds in an exposition that show how busy a server is, such as `api event_loop running`."""
    found: dict[str, float] = {}
    for process, state, thread, name, limit, model, value in _SAMPLE.findall(text):
        # Each of several models has series of its own, and a limit of its own if their precisions differ.
        key = name or (f"{limit} {model}" if limit else f"{process} {thread} {state}")
        found[key] = found.get(key, 0.0) + float(value)
    return found
