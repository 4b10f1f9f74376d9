"""The limits on requests and bytes in flight."""

from __future__ import annotations

import pytest

from inferctl.serve.edge.limits import InFlightLimits
from inferctl.serve.embeddings.schemas import ApiError


def test_requests_are_limited_and_rejected_ones_do_not_count() -> None:
    limits = InFlightLimits(max_requests=2)
    limits.add_request()
    limits.add_request()
    with pytest.raises(ApiError) as rejected:
        limits.add_request()
    assert (rejected.value.status, rejected.value.code) == (429, "too_many_requests")
    assert int(rejected.value.headers["retry-after"]) >= 1
    limits.release(0)
    limits.add_request()
    assert limits.requests == 2


def test_bodies_are_limited_together_and_a_single_one_is_always_accepted() -> None:
    limits = InFlightLimits(max_body_bytes=100)
    limits.add_request()
    limits.add_bytes(150)
    limits.add_request()
    with pytest.raises(ApiError) as rejected:
        limits.add_bytes(1)
    assert (rejected.value.status, rejected.value.code) == (429, "too_many_bytes")
    limits.release(0)
    limits.release(150)
    assert (limits.requests, limits.body_bytes) == (0, 0)
