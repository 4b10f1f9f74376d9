"""Compares cache libraries for vectors: hit ratio under Zipf traffic, time per operation, memory per entry.

    python benchmarks/peers/cache_policies.py [--json FILE]

One million distinct inputs, a cache of 1% of them, one million requests; each miss is followed by an insert. `shift`:
after half of the requests, other inputs become the popular ones. LRU is an `OrderedDict`. Values are vectors of 384
float32. The bound is in bytes where the library has one, else in entries of equal size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

INPUTS, REQUESTS, ENTRIES, VECTOR_BYTES = 1_000_000, 1_000_000, 10_000, 4 * 384
# Get a value, or None; set a value.
Operations = tuple[Callable[[bytes], Any], Callable[[bytes, Any], Any]]


def lru(most: int = ENTRIES) -> Operations:
    entries: OrderedDict[bytes, bytes] = OrderedDict()

    def get(key: bytes) -> bytes | None:
        if (value := entries.get(key)) is not None:
            entries.move_to_end(key)
        return value

    def put(key: bytes, value: bytes) -> None:
        entries[key] = value
        if len(entries) > most:
            entries.popitem(last=False)

    return get, put


def moka() -> Operations:
    from moka_py import Moka

    cache: Moka[bytes, bytes] = Moka(ENTRIES * VECTOR_BYTES, weigher=lambda _, value: len(value))
    return cache.get, cache.set


def theine() -> Operations:
    from theine import Cache

    cache: Cache[bytes, bytes] = Cache(ENTRIES)
    return lambda key: cache.get(key)[0], cache.set


def cachebox_lfu() -> Operations:
    import cachebox

    cache = cachebox.LFUCache(ENTRIES)
    return cache.get, cache.__setitem__


def traffic(exponent: float, shift: bool = False, inputs: int = INPUTS, requests: int = REQUESTS) -> list[int]:
    """Return the numbers of the requested inputs."""
    random = np.random.default_rng(1)
    weights = np.arange(1, inputs + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights / weights.sum())
    ranks = np.minimum(np.searchsorted(cumulative, random.random(requests)), inputs - 1)
    first, second = random.permutation(inputs), random.permutation(inputs)
    half = requests // 2 if shift else requests
    return [*first[ranks[:half]].tolist(), *second[ranks[half:]].tolist()]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def numbered(count: int) -> list[bytes]:
    """Return the keys of the first inputs."""
    return [blake2b(b"%d" % number, digest_size=16).digest() for number in range(count)]


def measure(create: Callable[[], Operations], requests: list[int]) -> tuple[float, float]:
    """Return the hit ratio, and microseconds per operation."""
    keys = numbered(INPUTS)
    get, put = create()
    hits = operations = 0
    vector = bytes(VECTOR_BYTES - 1)
    started = time.process_time()
    for number in requests:
        key = keys[number]
        operations += 1
        if get(key) is None:
            put(key, vector + b"\0")  # a new object, as each vector is
            operations += 1
        else:
            hits += 1
    seconds = time.process_time() - started
    return hits / len(requests), 1e6 * seconds / operations


def overhead(create: Callable[[], Operations]) -> float:
    """Return the resident bytes per entry of a full cache, its key included, beyond the vector."""
    _, put = create()
    put(b"first", bytes(VECTOR_BYTES))
    vector = bytes(VECTOR_BYTES - 1)
    gc.collect()
    before = resident_bytes()
    for number in range(ENTRIES - 1):
        put(blake2b(b"%d" % number, digest_size=16).digest(), vector + b"\0")
    return (resident_bytes() - before) / (ENTRIES - 1) - VECTOR_BYTES


def in_child(call: Callable[[], Any]) -> Any:
    """Return the result of `call` in a process of its own, so that no cache counts in the memory of another."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, json.dumps(call()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        found = json.load(stream)
    os.waitpid(child, 0)
    return found


def rows() -> Iterator[dict[str, Any]]:
    for name, create in (("LRU", lru), ("cachebox LFU", cachebox_lfu), ("moka-py", moka), ("theine", theine)):
        extra = in_child(partial(overhead, create))
        for label, exponent, shift in (
            ("0.8", 0.8, False),
            ("1.0", 1.0, False),
            ("1.2", 1.2, False),
            ("1.0 shift", 1.0, True),
        ):
            ratio, microseconds = in_child(partial(measure, create, traffic(exponent, shift)))
            row = {
                "cache": name,
                "zipf": label,
                "hit_ratio": ratio,
                "us_per_operation": microseconds,
                "overhead": extra,
            }
            print(
                f"{name:14} {label:10} {100 * ratio:6.1f}% {microseconds:8.2f} us {extra:8.0f} B per entry", flush=True
            )
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found = list(rows())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
