"""Counters and histograms without the client library: at the scrape, they are what the library would have."""

from __future__ import annotations

import random
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from inferctl.serve.observe.totals import Distribution, Family, Total

BOUNDS = (0.001, 0.5, 1, 16384)
VALUES = (0, 0.001, 0.0010001, 0.5, 1, 2.5, 16384, 16385, 1e300)


def exposition(registry: CollectorRegistry) -> list[str]:
    """Return what is scraped, without the times at which counters were created."""
    lines = generate_latest(registry).decode().splitlines()
    return [line.rpartition(" ")[0] if "_created" in line and line[0] != "#" else line for line in lines]


def test_a_scrape_equals_that_of_the_library() -> None:
    random_, found, expected = random.Random(1), CollectorRegistry(), CollectorRegistry()
    total = Family("a", 'A "total"\\.', "counter", Total, ["status", "who"])
    times: Family[Distribution] = Family("b", "Times.", "histogram", partial(Distribution, BOUNDS), ["phase"])
    plain, sizes = (
        Family("c", "C.", "counter", Total, []),
        Family("d", "D.", "histogram", partial(Distribution, BOUNDS), []),
    )
    for family in (total, times, plain, sizes):
        found.register(family)
    first, second = plain.labels(), sizes.labels()
    counter = Counter("a", 'A "total"\\.', ["status", "who"], registry=expected)
    histogram = Histogram("b", "Times.", ["phase"], buckets=BOUNDS, registry=expected)
    plain_counter = Counter("c", "C.", registry=expected)
    plain_histogram = Histogram("d", "D.", buckets=BOUNDS, registry=expected)
    assert exposition(found) == exposition(expected)
    for _ in range(500):
        labels, value, phase = (random_.choice((200, 429)), random_.choice('a"')), random_.choice(VALUES), "queue"
        for each in (total, counter):
            each.labels(*labels).inc(value)
        for measured in (times, histogram):
            measured.labels(phase).observe(value)
        for simple in (first, plain_counter):
            simple.inc()
        for size in (second, plain_histogram):
            size.observe(value)
    assert exposition(found) == exposition(expected)
    assert generate_latest(found).count(b"_created") == generate_latest(expected).count(b"_created")
