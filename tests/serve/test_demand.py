"""The metrics that autoscalers and alerts read, on real servers: offered tokens, the queue, the capacity, the SLO."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferctl.batching.latency_model import LatencyModel
from inferctl.serve.engines.echo import SLOW_TOKEN
from inferctl.serve.observe.metrics import Metrics, RequestMetrics, RequestSize
from inferctl.tenancy.metering.usage_event import UsageEvent
from tests.processes import ServerProcess, until

Serve = Callable[..., ServerProcess]
OFFERED = "inferctl_offered_tokens_total"


def offered(server: ServerProcess) -> tuple[float, float]:
    return server.metric(OFFERED, basis="counted"), server.metric(OFFERED, basis="estimated")


def test_the_tokens_of_accepted_and_rejected_requests_are_offered(echo: ServerProcess) -> None:
    before = offered(echo)
    assert echo.embed(input=[5] * 7).status_code == 200
    assert offered(echo) == (before[0] + 7, before[1])
    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(lambda _: echo.embed(input=[SLOW_TOKEN] + [5] * 30).status_code, range(12)))
    assert set(codes) == {200, 429}
    counted, estimated = (after - start for after, start in zip(offered(echo), before, strict=True))
    # A rejected request is counted after tokenization, or estimated if it was rejected before.
    assert counted % 31 == 7
    assert counted >= 7 + 31 * codes.count(200)
    assert counted + estimated == pytest.approx(7 + 31 * 12, rel=0.5)


def test_requests_that_no_capacity_would_help_are_not_offered(echo: ServerProcess) -> None:
    before = offered(echo)
    assert echo.embed(input=[]).status_code == 400
    assert echo.embed(input="a", model="other").status_code == 404
    assert echo.get("/v1/models").status_code == 200
    assert echo.get("/nothing").status_code == 404
    assert echo.post("/v1/embeddings", b"{}", content_type="a/b").status_code == 415
    assert offered(echo) == before


def test_cached_tokens_are_not_offered(serve: Serve, minilm: Path) -> None:
    server = serve("--model", str(minilm), "--engine", "echo", INFERCTL_CACHE_SIZE="16MiB")
    for _ in range(3):
        assert server.embed(input=[[5] * 8, [5] * 8, [6] * 4]).status_code == 200
    assert offered(server) == (12, 0)


def test_the_queue_is_reported_in_tokens_and_in_requests(echo: ServerProcess) -> None:
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(echo.embed, input=[SLOW_TOKEN] * 20) for _ in range(3)]
        until(lambda: echo.metric("inferctl_requests_in_flight") == 3)
        until(lambda: echo.metric("inferctl_requests_waiting") >= 1)
        assert echo.metric("inferctl_queue_tokens", basis="counted") in (20, 40)
        assert [each.result().status_code for each in running] == [200] * 3
    assert echo.metric("inferctl_requests_waiting") == echo.metric("inferctl_queue_tokens") == 0


def test_the_capacity_is_fitted_to_batches(echo: ServerProcess) -> None:
    for _ in range(100):
        assert echo.embed(input=[5]).status_code == 200
    assert echo.metric("inferctl_capacity_tokens_per_second", source="fitted") > 0


def test_the_slo_is_reported_and_a_bound_of_the_histogram(echo: ServerProcess) -> None:
    assert echo.metric("inferctl_slo_seconds", objective="request_p99") == 70
    before = echo.metric("inferctl_request_duration_seconds_count", priority="bulk")
    echo.post("/v1/embeddings", {"input": [5]}, x_priority="bulk")
    echo.embed(input=[5])
    assert echo.metric("inferctl_request_duration_seconds_count", priority="bulk") == before + 1
    for bound in ("70.0", "140.0"):
        assert echo.metric("inferctl_request_duration_seconds_bucket", priority="bulk", le=bound) == before + 1


def test_the_served_model_is_described(echo: ServerProcess) -> None:
    info = echo.get("/info").json()
    labels = {"model": "echo", "task": "embed", "sha256": info["model"]["sha256"][:12], "precision": "fp32"}
    assert echo.metric("inferctl_model_info", **labels) == 1
    assert echo.metric("inferctl_engine_up") == 1


def test_the_size_of_a_request_is_learned_from_completed_ones() -> None:
    size = RequestSize(answer_tokens=256)
    assert size.estimate(4000) == pytest.approx(1256)
    for _ in range(2000):
        size.observe(800, 100, 50)
    assert size.estimate(1600) == pytest.approx(250, rel=0.02)
    assert size.mean == pytest.approx(150, rel=0.02)


@pytest.mark.parametrize(
    ("status", "code", "endpoint", "tokens"),
    [
        (429, "queue_full", "embeddings", 100),
        (429, "slo", "embeddings", 100),
        (429, "too_many_requests", "rerank", 100),
        (503, "not_ready", "chat", 100),
        (429, "queue_full", "other", 0),  # not a task
        (429, "rate_limit_exceeded", "embeddings", 0),
        (429, "key_share", "embeddings", 0),  # another server would not accept it either
        (503, "metering_unavailable", "embeddings", 0),
        (401, "invalid_api_key", "embeddings", 0),
        (413, "body_too_large", "embeddings", 0),
    ],
)
def test_only_rejections_for_lack_of_capacity_are_estimated(status: int, code: str, endpoint: str, tokens: int) -> None:
    metrics = Metrics()
    metrics.count_event(UsageEvent("a", endpoint, status, code, content_length=400))
    assert metrics.registry.get_sample_value(OFFERED, {"basis": "estimated"}) == pytest.approx(tokens)
    # Its inputs are known, so it was offered before.
    metrics.count_event(UsageEvent("a", endpoint, status, code, content_length=400, inputs=2))
    assert metrics.registry.get_sample_value(OFFERED, {"basis": "estimated"}) == pytest.approx(tokens)


@pytest.mark.parametrize(("read", "tokens"), [(0, 400), (1, 400), (4000, 1000), (4 << 20, 1 << 20)])
def test_what_only_a_header_says_counts_as_four_requests_at_most(read: int, tokens: int) -> None:
    metrics = Metrics()
    metrics.count_event(UsageEvent("a", "embeddings", 429, "queue_full", content_length=4 << 20, body_bytes=read))
    assert metrics.registry.get_sample_value(OFFERED, {"basis": "estimated"}) == pytest.approx(tokens)


def test_a_priority_that_a_client_invents_is_no_label() -> None:
    metrics = RequestMetrics()
    for number in range(50):
        metrics.count_event(UsageEvent("a", "chat", 200, priority=f"mine-{number}"))
    assert b"mine-" not in metrics.exposition()[0]


def test_the_fitted_capacity_needs_own_batches() -> None:
    model = LatencyModel()
    for _ in range(99):
        model.observe(64, 0.05)
    assert model.tokens_per_second(64, 2) is None
    model.observe(64, 0.05)
    assert model.tokens_per_second(64, 2) == pytest.approx(2 * 64 / 0.05)
