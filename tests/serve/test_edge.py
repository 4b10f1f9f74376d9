"""The edge in front of a small application: limits, errors, probes, and one usage event per request on every path."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from inferctl.config import spec
from inferctl.serve.edge import request_context
from inferctl.serve.edge.access import EdgeAccess
from inferctl.serve.edge.edge import ClientDisconnectedError, Edge, EdgeLimits, unless_disconnected
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.pages import Pages
from inferctl.serve.edge.request_context import Asked, ConnectionNotes, RequestContext, context_of
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.work import Caller
from inferctl.tenancy.metering.usage_event import UsageEvent
from tests.tenancy.key_files import add

Run = Callable[..., Coroutine[Any, Any, "Answer"]]
LIMITS = EdgeLimits(max_body_bytes=100, max_requests=2, max_bytes=150)


class Answer:
    """What the connection received from the edge."""

    def __init__(self, messages: list[Message]) -> None:
        start, *parts = messages or [{"status": 0, "headers": []}]
        self.status, self.headers = start["status"], dict(start["headers"])
        self.body = b"".join(part["body"] for part in parts)

    @property
    def code(self) -> str | None:
        code: str | None = json.loads(self.body)["error"]["code"]
        return code


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, then do what the path says."""
    context = context_of(scope)
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        size += len(message["body"])
        more = message["more_body"]
    context.inputs, context.input_tokens, context.phases = 1, size, {"queue": 0.25}
    if scope["path"] == "/error":
        raise ApiError(400, "bad", code="bad", param="input")
    if scope["path"] == "/bug":
        raise KeyError("bug")
    if scope["path"] == "/wait":
        await unless_disconnected(asyncio.get_running_loop().create_future, scope)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if scope["path"] == "/late-bug":
        raise KeyError("bug")
    for _ in range(5 if scope["path"] == "/parts" else 0):
        await send({"type": "http.response.body", "body": b"a part" * 4000, "more_body": True})
    await send({"type": "http.response.body", "body": b"x" * size})


def disconnect(state: dict[str, Any]) -> None:
    """Do what the connection does if its client disconnects."""
    notes = ConnectionNotes.of({"state": state})
    notes.disconnected = True
    if notes.on_disconnect:
        notes.on_disconnect()


class Setting:
    """An edge, the events that it emitted, and a way to send it requests."""

    def __init__(self, limits: EdgeLimits = LIMITS, access: EdgeAccess | None = None) -> None:
        self.events: list[UsageEvent] = []
        self.sinks: list[Callable[[UsageEvent], None]] = [self.events.append]
        self.ready = True
        self.lifecycle = Lifecycle(lambda: self.ready, lambda: self.ready)
        self.edge = Edge(
            application,
            self.lifecycle,
            sinks=self.sinks,
            page=Pages(
                self.lifecycle,
                lambda: {"name": "m"} if self.ready else None,
                lambda: (b"metrics", "text/plain"),
                ["/v1/embeddings"],
            ).answer,
            endpoints={"/v1/embeddings": "embeddings"},
            limits=limits,
            access=access,
        )

    async def send(
        self,
        path: str = "/v1/embeddings",
        *body: bytes,
        method: str = "POST",
        leaves: bool = False,
        state: dict[str, Any] | None = None,
        on_part: Callable[[], object] = lambda: None,
        **headers: str,
    ) -> Answer:
        """Send a request whose body has these parts. `leaves`: the client disconnects after the last one."""
        state = {} if state is None else state
        scope = {
            "state": state,
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in body or [b""]]
        messages[-1]["more_body"] = False
        got: list[Message] = []

        async def receive() -> Message:
            if messages:
                if leaves and len(messages) == 1:
                    asyncio.get_running_loop().call_soon(disconnect, state)
                return messages.pop(0)
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            got.append(message)
            if message.get("more_body"):
                on_part()

        await self.edge(scope, receive, send)
        return Answer(got)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_a_success_has_the_id_of_the_client_and_one_event(setting: Setting) -> None:
    answer = asyncio.run(setting.send("/v1/embeddings", b"abc", b"de", x_request_id="mine", x_priority="bulk"))
    assert (answer.status, answer.body, answer.headers[b"x-request-id"]) == (200, b"xxxxx", b"mine")
    (event,) = setting.events
    assert (event.request_id, event.endpoint, event.status, event.code) == ("mine", "embeddings", 200, None)
    assert (event.priority, event.inputs, event.input_tokens, event.body_bytes) == ("bulk", 1, 5, 5)
    assert event.phases == {"queue": 0.25}
    assert (setting.edge.in_flight, setting.edge.unfinished_responses) == (0, 0)


@pytest.mark.parametrize(
    ("path", "status", "code"), [("/error", 400, "bad"), ("/bug", 500, "internal_error"), ("/wait", 0, None)]
)
def test_a_failure_has_an_envelope_and_one_event(setting: Setting, path: str, status: int, code: str | None) -> None:
    answer = asyncio.run(setting.send(path, b"abc", leaves=path == "/wait"))
    (event,) = setting.events
    assert answer.status == status
    if code:
        assert (answer.code, event.status, event.code) == (code, status, code)
        assert answer.headers[b"x-request-id"].decode() == event.request_id
    else:
        assert (event.status, event.code) == (request_context.CLIENT_DISCONNECTED, "client_disconnected")
    assert (setting.edge.in_flight, setting.edge.unfinished_responses) == (0, 0)


@pytest.mark.parametrize("path", ["/wait", "/error", "/v1/embeddings"])
def test_the_event_has_the_status_of_a_rejection_by_the_connection(setting: Setting, path: str) -> None:
    state: dict[str, Any] = {}
    ConnectionNotes.of({"state": state}).rejection = 431, "headers_too_large"
    asyncio.run(setting.send(path, leaves=True, state=state))
    assert [(event.status, event.code) for event in setting.events] == [(431, "headers_too_large")]


@pytest.mark.parametrize(
    ("disconnects", "drains", "error"),
    [
        ("before", False, ClientDisconnectedError),
        ("during", False, ClientDisconnectedError),
        ("with the result", False, ClientDisconnectedError),
        ("after", False, None),
        ("never", True, asyncio.CancelledError),
        ("during", True, asyncio.CancelledError),
    ],
)
def test_work_ends_if_the_client_disconnects(disconnects: str, drains: bool, error: type[BaseException] | None) -> None:
    async def run() -> None:
        state: dict[str, Any] = {}
        loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        begun: list[str] = []

        async def work() -> int:
            begun.append("work")
            return int(await result)

        async def request() -> int:
            found = await unless_disconnected(work, {"state": state})
            if disconnects == "after":
                disconnect(state)
            await asyncio.sleep(0)  # a late cancellation would end the response
            return found

        async def event() -> str:
            try:
                return str(await request())
            except ClientDisconnectedError:
                await asyncio.sleep(0)  # what the edge waits for afterwards is not cancelled
                return "disconnected"

        if disconnects == "before":
            disconnect(state)
        task = asyncio.create_task(event())
        await asyncio.sleep(0)
        if disconnects == "during":
            loop.call_soon(disconnect, state)
        if disconnects in ("after", "with the result"):
            result.set_result(1)
        if disconnects == "with the result":
            disconnect(state)
        if drains:
            loop.call_soon(task.cancel)
        if error is asyncio.CancelledError:
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            assert await task == ("disconnected" if error else "1")
        assert begun == ([] if disconnects == "before" else ["work"])
        assert result.cancelled() == (disconnects in ("during", "never"))

    asyncio.run(asyncio.wait_for(run(), 10))


def test_an_error_after_the_start_of_a_response_reaches_the_connection(setting: Setting) -> None:
    with pytest.raises(ApiError):
        asyncio.run(setting.send("/late-bug", b"abc"))
    assert [event.code for event in setting.events] == ["internal_error"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_gets_413(setting: Setting, announced: bool) -> None:
    headers = {"content_length": "101"} if announced else {}
    answer = asyncio.run(setting.send("/v1/embeddings", b"a" * 60, b"a" * 41, **headers))
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert [event.code for event in setting.events] == ["body_too_large"]


def test_requests_in_flight_are_limited_in_number_and_bytes(setting: Setting) -> None:
    async def run() -> list[Answer]:
        waiting = [asyncio.create_task(setting.send("/wait", b"a" * 80))]
        await asyncio.sleep(0)
        answers = [await setting.send("/v1/embeddings", b"a" * 80)]
        waiting.append(asyncio.create_task(setting.send("/wait", b"a")))
        await asyncio.sleep(0)
        answers.append(await setting.send("/v1/embeddings", b"a"))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        answers.append(await setting.send("/v1/embeddings", b"a" * 80))
        return answers

    many_bytes, many_requests, accepted = asyncio.run(run())
    assert (many_bytes.status, many_bytes.code) == (429, "too_many_bytes")
    assert (many_requests.status, many_requests.code) == (429, "too_many_requests")
    assert int(many_requests.headers[b"retry-after"]) >= 1
    assert accepted.status == 200
    assert [event.code for event in setting.events if event.status == 503] == ["stopped", "stopped"]
    assert setting.edge.unfinished_responses == 2


@pytest.mark.parametrize("tenants", [[], ["other"]])
def test_a_single_body_in_parts_may_be_larger_than_what_all_bodies_may_have(tenants: list[str]) -> None:
    """With many API processes, each has a small part of what all bodies may have."""
    edge = Setting(EdgeLimits(max_body_bytes=400, max_requests=4, max_bytes=200)).edge
    first, second = (RequestContext(Asked(), 0, Caller(tenant=name if tenants else None)) for name in "ab")
    for _ in range(3):
        edge.add_body(first, 100)
    with pytest.raises(ApiError) as rejected:
        edge.add_body(second, 100)
    assert rejected.value.code == "too_many_bytes"
    edge.check_body(400, "/v1/embeddings")
    with pytest.raises(ApiError) as rejected:
        edge.check_body(401, "/v1/embeddings")
    assert rejected.value.status == 413


def test_large_responses_take_turns_so_that_others_wait_for_one_part_only(setting: Setting) -> None:
    iteration, parts = 0, Counter[int]()

    async def count_iterations() -> None:
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    async def run() -> None:
        counting = asyncio.create_task(count_iterations())
        await asyncio.gather(
            *(setting.send("/parts", on_part=lambda: parts.update([iteration])) for _ in range(LIMITS.max_requests))
        )
        counting.cancel()

    asyncio.run(run())
    first, *others = parts.values()
    assert (first + sum(others), max(others)) == (10, 1)


def test_the_phases_decide_about_probes_and_requests(setting: Setting) -> None:
    def statuses(*paths: str) -> list[int]:
        return [asyncio.run(setting.send(path, method="GET")).status for path in paths]

    setting.ready = False
    assert statuses("/livez", "/readyz", "/info", "/metrics", "/health", "/") == [503, 503, 503, 200, 503, 200]
    rejected = asyncio.run(setting.send())
    assert (rejected.status, rejected.code, rejected.headers[b"retry-after"]) == (503, "not_ready", b"5")
    setting.ready = setting.lifecycle.started = True
    assert statuses("/livez", "/readyz", "/info", "/metrics", "/health", "/") == [200] * 6
    assert asyncio.run(setting.send("/livez")).status == 405
    setting.lifecycle.draining = True
    assert statuses("/livez", "/readyz", "/health") == [200, 503, 503]
    assert asyncio.run(setting.send()).status == 200
    setting.lifecycle.closed = True
    assert asyncio.run(setting.send()).status == 503
    # Probes emit no event.
    assert [event.status for event in setting.events] == [503, 200, 503]


def test_an_event_reaches_every_sink_although_one_fails(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: UsageEvent) -> None:
        raise OSError("disk full")

    setting.sinks.insert(0, broken)
    assert asyncio.run(setting.send()).status == 200
    assert [event.status for event in setting.events] == [200]
    assert "disk full" in caplog.text


def test_only_successes_count_in_the_latency_histogram() -> None:
    metrics = Metrics()
    for status, code in [(200, None), (400, "bad"), (429, "slo"), (503, "not_ready"), (499, "client_disconnected")]:
        metrics.count_event(UsageEvent("a", "embeddings", status, code, seconds=1))
    metrics.count_event(UsageEvent("", "", 408, "request_timeout"))
    value = metrics.registry.get_sample_value
    labels = {"endpoint": "embeddings", "priority": "interactive"}
    assert value("inferctl_request_duration_seconds_count", labels) == 1
    assert value("inferctl_requests_total", {"endpoint": "embeddings", "status": "429"}) == 1
    assert value("inferctl_requests_total", {"endpoint": "none", "status": "408"}) == 1
    assert value("inferctl_cancelled_total") == 1
    reasons = ("slo", "not_ready", "request_timeout")
    assert [value("inferctl_rejected_total", {"reason": reason}) for reason in reasons] == [1, 1, 1]


async def test_one_key_does_not_take_all_requests_and_bodies(tmp_path: Path) -> None:
    (_, first), (_, second) = add(tmp_path / "keys.json"), add(tmp_path / "keys.json", "b")
    access = EdgeAccess(spec.Access(keys=str(tmp_path / "keys.json")), ["m"])
    for limits, body in ((EdgeLimits(max_requests=10), b"x"), (EdgeLimits(max_bytes=100, max_requests=40), b"x" * 10)):
        setting = Setting(limits, access)

        def send(key: str, path: str = "/wait", setting: Setting = setting, body: bytes = body) -> asyncio.Task[Answer]:
            return asyncio.create_task(setting.send(path, body, authorization=f"Bearer {key}"))

        waiting = [send(first) for _ in range(20)]
        await asyncio.sleep(0.05)
        rejected = [task.result() for task in waiting if task.done()]
        assert {(answer.status, answer.code) for answer in rejected} == {(429, "key_share")}
        assert len(rejected) == 12
        assert (await send(second, "/v1/embeddings")).status == 200
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (await send(first, "/v1/embeddings")).status == 200
        assert setting.edge._requests._held == {} == setting.edge._bodies._held
    assert access._table
    access._table.close()
