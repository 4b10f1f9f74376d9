"""The measured limit of the front end."""

from __future__ import annotations

import json

import pytest

from inferctl.core import assets
from inferctl.estimate import front_end
from inferctl.estimate.front_end import FILE, FrontEnd

TWO = FrontEnd(((1, 0.001), (9, 0.003)), "a machine", hop=1.1, backend_s=0.0002)


def test_measured_sizes_have_their_measured_times() -> None:
    data = json.loads((assets.root() / FILE).read_text(encoding="utf-8"))
    assert (assets.root() / data["script"]).is_file() and data["machine"]["cpu"]
    for one in data["requests"]:
        assert front_end.load().seconds(one["texts_per_request"]) == pytest.approx(one["ms_per_request"] / 1000)


def test_sizes_between_and_beyond_the_measured_ones() -> None:
    assert TWO.seconds(5) == pytest.approx(0.002)
    assert TWO.seconds(18) == pytest.approx(0.006)
    assert TWO.texts_per_s(5) == pytest.approx(2500)


@pytest.mark.parametrize(
    ("processes", "seconds"),
    [(1, 0.001), (2, 0.00055), (4, 0.000275), (8, 0.0002)],  # eight would be faster than the backend
)
def test_several_processes_share_the_work_until_the_backend_is_full(processes: int, seconds: float) -> None:
    assert TWO.seconds(1, processes) == pytest.approx(seconds)
    assert TWO.as_dict(1, processes)["texts_per_s"] == pytest.approx(1 / seconds)
