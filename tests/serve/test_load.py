"""The bounds on what is held at a time."""

from __future__ import annotations

import pytest

from inferctl.serve.http import ApiError
from inferctl.serve.load import Load


def test_requests_are_bounded_and_a_refusal_takes_no_place() -> None:
    load = Load(max_requests=2)
    load.enter()
    load.enter()
    with pytest.raises(ApiError) as refused:
        load.enter()
    assert (refused.value.status, refused.value.code) == (429, "too_many_requests")
    assert int(refused.value.headers["retry-after"]) >= 1
    load.leave(0)
    load.enter()
    assert load.requests == 2


def test_bodies_are_bounded_together_and_one_alone_is_always_taken() -> None:
    load = Load(max_body_bytes=100)
    load.enter()
    load.hold(150)
    load.enter()
    with pytest.raises(ApiError) as refused:
        load.hold(1)
    assert (refused.value.status, refused.value.code) == (429, "too_many_bytes")
    load.leave(0)
    load.leave(150)
    assert (load.requests, load.body_bytes) == (0, 0)
