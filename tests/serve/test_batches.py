"""`/v1/files` and `/v1/batches` with OpenAI's client on real servers, which are killed, limited and lied to."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from inferctl.core import outputs
from inferctl.serve.batches.store import OwnerFolder
from inferctl.serve.engines.echo import CRASHING_TOKEN, SLOW_TOKEN
from inferctl.tenancy.access import key_file
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.metering.ledger import Ledger
from tests.processes import is_ready, start, until
from tests.tenancy.key_files import add

WORKER = "inferctl.serve.batches.worker"


class Site:
    """A server with batches, keys and usage events in one folder, which can be killed and started again."""

    def __init__(self, folder: Path, model: Path, processes: int) -> None:
        self.folder, self.keys = folder, folder / "keys.json"
        self.arguments = ("--model", str(model), "--engine", "echo", "--name", "m", "--keys", str(self.keys))
        settings = {"SERVE_BATCHES_FOLDER": "batches", "SERVE_API_PROCESSES": processes, "METERING_MODE": "on"}
        self.environment = {f"INFERCTL_{name}": str(value) for name, value in settings.items()}
        # Before the start: each API process reads a new key at a moment of its own.
        self.spare = [add(self.keys, f"k{number}") for number in range(30)]
        self.limited = add(self.keys, "limited", requests_per_minute=12)
        self.embeds = add(self.keys, "embeds", endpoints=["embeddings"])
        self.start()

    def start(self) -> None:
        self.server = start(self.folder, *self.arguments, INFERCTL_ACCESS_OPEN="metrics", **self.environment)

    def client(self, key: tuple[ApiKey, str] | None = None) -> openai.OpenAI:
        """Return the client of a key, or of one that no test has."""
        self.key, secret = key or self.spare.pop()
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, max_retries=0)

    def path(self, name: str) -> Path:
        (found,) = (self.folder / "batches").glob(f"*/{name}")
        return found

    def known(self, object_id: str, **changes: object) -> dict[str, Any]:
        """Return what the server knows of a file or batch, after a change, as time would make it."""
        path = self.path(f"{object_id}.json")
        document: dict[str, Any] = json.loads(path.read_bytes()) | changes
        if changes:
            outputs.replace(path, json.dumps(document))
        return document


@pytest.fixture(scope="module", params=[1, 3])
def site(request: pytest.FixtureRequest, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("batches"), minilm, request.param)
    yield site
    site.server.kill()


def lines(inputs: Iterable[object], **changes: object) -> bytes:
    line = {"method": "POST", "url": "/v1/embeddings"} | changes
    found = [line | {"custom_id": f"c{n}", "body": {"input": each}} for n, each in enumerate(inputs)]
    return b"".join(json.dumps(each).encode() + b"\n" for each in found)


def slow(count: int) -> bytes:
    """Return lines that take half a second each."""
    return lines([[SLOW_TOKEN, 200 + n] for n in range(count)])


def created(client: openai.OpenAI, content: bytes) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")


def waited(client: openai.OpenAI, batch: Batch, completed: int | None = None) -> Batch:
    """Return a batch at its end, or when so many lines are complete."""
    found = [batch]

    def look() -> bool:
        found[0] = client.batches.retrieve(batch.id)
        if completed is not None:
            return found[0].request_counts is not None and found[0].request_counts.completed >= completed
        return found[0].status not in ("validating", "in_progress", "cancelling")

    until(look)
    return found[0]


def results(site: Site, batch: dict[str, Any] | Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return output and errors by custom_id. Fails if one is there twice."""
    batch, found = batch if isinstance(batch, dict) else batch.model_dump(), []
    for name in filter(None, (batch["output_file_id"], batch["error_file_id"])):
        found += [json.loads(row) for row in site.path(name).read_text().splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    good = {row["custom_id"]: row for row in found if row["response"] and row["response"]["status_code"] == 200}
    return good, {row["custom_id"]: row for row in found if row["custom_id"] not in good}


def test_the_official_client_runs_a_batch(site: Site) -> None:
    other, client = site.client(), site.client()
    batch = waited(client, created(client, lines([f"text {n}" for n in range(120)] + [""]) + b"\n"))
    assert (batch.status, batch.endpoint) == ("completed", "/v1/embeddings")
    assert batch.request_counts and vars(batch.request_counts).items() >= {"total": 121, "completed": 120}.items()
    output, errors = results(site, batch)
    assert output.keys() == {f"c{n}" for n in range(120)}
    direct = client.embeddings.create(model="m", input="text 7", encoding_format="float").data[0].embedding
    assert output["c7"]["response"]["body"]["data"][0]["embedding"] == direct
    assert errors["c120"]["response"]["body"]["error"]["code"] == "empty_input"
    # Each line is a request of the key.
    database = site.folder / "metering" / "ledger.sqlite"
    until(database.exists)
    ledger = Ledger.open(f"sqlite:///{database}")
    wanted = {"key": site.key.id, "endpoint": "embeddings", "requests": 122}
    until(lambda: any(wanted.items() <= row.items() for row in ledger.usage(["key", "endpoint"], 0, 2**60)))
    # Lists, and what another key sees.
    assert [each.id for each in client.batches.list()] == [batch.id]
    files = [each.id for each in client.files.list(limit=2, order="asc")]
    assert sorted(files) == sorted(filter(None, [batch.input_file_id, batch.output_file_id, batch.error_file_id]))
    assert client.files.content(batch.output_file_id or "").read() == site.path(batch.output_file_id or "").read_bytes()
    assert [*other.files.list(), *other.batches.list()] == []
    for wrong in (files[0], "../worker.lock", "..%2f..%2fetc%2fpasswd", f"{files[0]}.json", "x\0", "a" * 5000):
        for ask in (other.files.retrieve, other.files.content, other.files.delete, other.batches.retrieve):
            with pytest.raises(openai.NotFoundError):
                ask(wrong)
    with pytest.raises(openai.NotFoundError):
        other.batches.cancel(batch.id)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    assert all(client.files.delete(file_id).deleted for file_id in files)
    assert not [path for path in (site.folder / "batches").glob("*/file-*") if path.stem in files]


GOOD = lines(["a"])
BAD = {
    "not JSON": (GOOD + b"{\n", "invalid_json_line", 2, None),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", 1, None),
    "deep": (b"[" * 100_000, "invalid_json_line", 1, None),
    "a list": (b"[]", "invalid_request", 1, None),
    "no id": (b'{"method":"POST","url":"/v1/embeddings","body":{}}', "missing_required_parameter", 1, "custom_id"),
    "twice": (GOOD + b"\n" + GOOD, "duplicate_custom_id", 3, "custom_id"),
    "other url": (lines(["a"], url="/v1/rerank"), "url_mismatch", 1, "url"),
    "GET": (lines(["a"], method="GET"), "invalid_request", 1, "method"),
    "no object": (lines(["a"]).replace(b'{"input": "a"}', b"[]"), "invalid_request", 1, "body"),
    "a long line": (lines(["a" * 5_000_000]), "invalid_request", 1, None),
    "many": (lines(["a"] * 50_001), "too_many_tasks", 50_001, None),
    "a deep body": (lines([[]]).replace(b"[]", b"[" * 500 + b"]" * 500), "invalid_json_line", 1, None),
    "empty": (b"\n \n", "empty_file", None, None),
}


def test_bad_lines_fail_their_batch_and_are_named(site: Site) -> None:
    client = site.client()
    batches = {name: created(client, content) for name, (content, *_) in BAD.items()}
    for name, batch in batches.items():
        found = waited(client, batch)
        assert found.status == "failed" and found.errors and found.errors.data
        first = found.errors.data[0]
        assert (first.code, first.line, first.param) == BAD[name][1:], name


def test_bad_requests_are_refused(site: Site) -> None:
    client = site.client()
    file = client.files.create(file=("in.jsonl", GOOD), purpose="batch")
    good: dict[str, Any] = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    for change, error in (
        ({"input_file_id": "file-0"}, openai.NotFoundError),
        ({"endpoint": "/v1/rerank"}, openai.BadRequestError),
        ({"endpoint": "/v1/files"}, openai.BadRequestError),
        ({"completion_window": "1h"}, openai.BadRequestError),
        ({"metadata": {"a": "b" * 513}}, openai.BadRequestError),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, openai.BadRequestError),
    ):
        with pytest.raises(error):
            client.batches.create(**good | change)
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=GOOD, purpose="fine-tune")
    form = {"content-type": "multipart/form-data; boundary=b", "authorization": f"Bearer {client.api_key}"}
    part = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n%s\r\n--b--\r\n'
    escapes = {"content-type": "multipart/form-data; boundary=b; charset=unicode_escape"}
    content = b'--b\r\nContent-Disposition: form-data; name="file"; filename="\\ud800"\r\n\r\na\r\n'
    for method, headers, body, status in (
        ("POST", {}, part % b"batch", 400),  # without a file
        ("POST", escapes, part % b"\\ud800", 400),
        ("POST", escapes, content + part % b"batch", 200),
        ("POST", {}, part % bytes(2000), 400),
        ("POST", {}, b"nothing", 400),
        ("POST", {"content-length": "200100000"}, b"", 413),
        ("PUT", {}, b"", 404),
    ):
        connection = http.client.HTTPConnection(site.server.url.removeprefix("http://"))
        connection.request(method, "/v1/files", body, form | headers)
        assert connection.getresponse().status == status
    with pytest.raises(openai.PermissionDeniedError):
        site.client(site.embeds).files.create(file=GOOD, purpose="batch")


@pytest.mark.parametrize("victim", ["server", "worker"])
def test_a_killed_batch_goes_on_with_what_is_not_on_disk(site: Site, victim: str) -> None:
    client, before = site.client(), 0
    batch = created(client, slow(12) + GOOD.replace(b"c0", b"last"))
    waited(client, batch, completed=3)
    if victim == "worker":
        os.kill(site.server.children(WORKER)[0], signal.SIGKILL)
    else:
        site.server.kill()
        before = len(site.path(f"file-{batch.id[6:]}-output").read_bytes().splitlines())
        site.start()
        client.base_url = f"{site.server.url}/v1"
    batch = waited(client, batch)
    output, errors = results(site, batch)
    assert (batch.status, len(output), errors) == ("completed", 13, {})
    if victim == "server":
        assert site.server.metric("inferctl_requests_total", endpoint="embeddings", status="200") <= 13 - before


def test_a_cancelled_batch_keeps_what_is_done_and_a_revoked_key_stops_its_batch(site: Site) -> None:
    client = site.client()
    batch = created(client, slow(200))
    waited(client, batch, completed=2)
    queued = created(client, slow(5))
    for each in (queued, batch):
        client.batches.cancel(each.id)
        assert waited(client, each).status == "cancelled"
    output, errors = results(site, client.batches.retrieve(batch.id))
    assert len(output) >= 2 and len(output) + len(errors) == 200
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    batch = created(client, slow(200))
    waited(client, batch, completed=1)
    with key_file.edit(site.keys) as keys:
        keys[site.key.id] = keys[site.key.id].model_copy(update={"revoked": key_file.now()})
    until(lambda: site.known(batch.id)["status"] == "cancelled")


def test_a_batch_obeys_the_limits_of_its_key_and_expires(site: Site) -> None:
    client, other = site.client(site.limited), site.client()
    batch = created(client, lines(["a"] * 40))
    waited(client, batch, completed=5)
    assert waited(other, created(other, GOOD)).status == "completed"  # other keys do not wait for it
    site.known(batch.id, expires_at=1)
    until(lambda: site.known(batch.id)["status"] == "expired")
    output, errors = results(site, site.known(batch.id))
    assert len(output) <= 12 and len(output) + len(errors) == 40
    assert {row["error"]["code"] for row in errors.values()} == {"batch_expired"}


def test_a_line_that_ends_the_engine_is_an_error_and_not_sent_for_ever(site: Site) -> None:
    client = site.client()
    batch = waited(client, created(client, lines([[CRASHING_TOKEN], "a"])))
    output, errors = results(site, batch)
    assert [*output] == ["c1"]
    assert errors["c0"]["response"]["status_code"] == 503
    until(lambda: is_ready(site.server.url))


def test_an_upload_without_space_gets_507_and_leaves_nothing(site: Site) -> None:
    """A limit of the size of files fails as a full disk does, with another number."""
    client, limit = site.client(), resource.RLIMIT_FSIZE
    old = {pid: resource.prlimit(pid, limit) for pid in (site.server.process.pid, *site.server.api_pids())}
    try:
        for pid in old:
            resource.prlimit(pid, limit, (900_000, old[pid][1]))
        with pytest.raises(openai.InternalServerError, match="file too large") as caught:
            client.files.create(file=bytes(1_000_000), purpose="batch")
    finally:
        for pid in old:
            resource.prlimit(pid, limit, old[pid])
    assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
    assert list(OwnerFolder.of(site.folder / "batches", f"key:{site.key.id}").path.iterdir()) == []


def test_files_are_on_disk_and_not_in_memory(site: Site) -> None:
    client, content = site.client(), os.urandom(1_000_000) * 100
    pids = [site.server.process.pid, *site.server.children()]
    before = [peak(pid) for pid in pids]
    file = client.files.create(file=content, purpose="batch")
    assert client.files.content(file.id).read() == content
    assert max(peak(pid) - old for pid, old in zip(pids, before, strict=True)) < 60_000
    folder = OwnerFolder(site.path(file.id).parent)
    site.known(file.id, expires_at=1)
    folder.sweep()
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    assert list(folder.path.iterdir()) == []


def peak(pid: int) -> int:
    """Return the largest memory that a process ever had (kB)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])
