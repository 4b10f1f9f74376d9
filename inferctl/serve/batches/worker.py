"""The process that runs batches: it sends their lines to the server's own port, as bulk requests of their keys.

    python -m inferctl.serve.batches.worker

The first line of stdin is JSON with `folder`, `url` and `secret`. At the end of stdin, also if the server was killed,
the worker writes the responses that still come, and ends. What is on disk then is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from inferctl.core import streams
from inferctl.serve.batches import lines
from inferctl.serve.batches.store import KEPT_S, Document, OwnerFolder, output_ids

log = logging.getLogger("inferctl.batches")

_MOST_IN_FLIGHT = 64  # of all batches
_TICK_S, _SWEEP_S, _RETRY_S, _PAUSE_S = 0.5, 3600.0, 1.0, 10.0
_TIMEOUT_S = 600.0
# A 503 whose message has these words is because of the request itself: the server has run it in isolation.
_OF_REQUEST = b"this request"


class Client:
    """Sends requests to one server, on threads with a connection each."""

    def __init__(self, url: str, secret: str) -> None:
        self._host, self._secret = urlsplit(url).netloc, secret
        self._local, self._threads = threading.local(), ThreadPoolExecutor(_MOST_IN_FLIGHT)

    async def send(self, *request: Any) -> tuple[http.client.HTTPResponse, bytes]:
        """Return the response to the request of a line: owner, path, id, line. Raises `OSError` and `HTTPException`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._send, *request)

    def _send(self, owner: str, path: str, request_id: str, raw: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = getattr(self._local, "connection", None) or http.client.HTTPConnection(
            self._host, timeout=_TIMEOUT_S
        )
        self._local.connection = None  # after an error, it cannot be used
        headers: dict[str, str | bytes] = {"content-type": "application/json", "x-priority": "bulk"}
        headers["x-request-id"] = request_id
        if owner:
            # As bytes, because the name of a caller may be no Latin-1.
            headers["authorization"] = f"Bearer {self._secret}{owner}".encode()
        connection.request("POST", path, orjson.dumps(orjson.loads(raw)["body"]), headers)
        response = connection.getresponse()
        body = response.read()
        self._local.connection = connection
        return response, body


class BatchRun:
    """One batch from its first line, or from where it was cut off, to its end."""

    def __init__(self, worker: BatchWorker, folder: OwnerFolder, batch: Document) -> None:
        self._worker, self._folder, self._batch = worker, folder, batch
        self._paths = [folder.path / name for name in output_ids(batch["id"])]
        self._window, self._not_before = 4.0, 0.0  # requests in flight; no other is sent before
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._status, self._code = "completed", ""  # at the end, and of lines without a response

    async def run(self) -> Document:
        """Send lines until none is left, the batch is cancelled or expires, or the worker stops. Return it."""
        done = [await asyncio.to_thread(lines.finished, path) for path in self._paths]
        self._counts = self._batch["request_counts"] | {"completed": len(done[0]), "failed": len(done[1])}
        left: Iterator[tuple[int, bytes]] = iter(())  # of a batch that was cancelled before its lines were checked
        if self._batch["in_progress_at"]:
            left = lines.pending(self._folder.path / self._batch["input_file_id"], done[0] | done[1])
        stopping, look = self._worker.stopping, 0.0
        tasks: set[asyncio.Task[None]] = set()
        with self._paths[0].open("ab") as output, self._paths[1].open("ab") as errors:
            self._files = output, errors
            while True:
                if (now := time.monotonic()) >= look:
                    await asyncio.to_thread(self._look)
                    look = now + _TICK_S
                while len(tasks) < self._window and now >= self._not_before and not (self._code or stopping.is_set()):
                    line = self._waiting.popleft() if self._waiting else next(left, None)
                    if line is None:
                        break
                    tasks.add(asyncio.create_task(self._send(*line)))
                if tasks:
                    finished, tasks = await asyncio.wait(tasks, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                    try:
                        for task in finished:
                            task.result()
                        output.flush()
                        errors.flush()
                    except OSError:  # as of a full disk; the next run cuts off what was not written to its end
                        for task in tasks:
                            task.cancel()
                        raise
                elif self._waiting and not (self._code or stopping.is_set()):
                    await asyncio.sleep(max(0.0, min(self._not_before, look) - now))
                else:
                    break
            if not stopping.is_set():
                await asyncio.to_thread(self._finish, chain(self._waiting, left))
        return self._batch

    async def _send(self, number: int, raw: bytes) -> None:
        request_id, batch = lines.request_id(self._batch["id"], number), self._batch
        try:
            response, body = await self._worker.client.send(batch["owner"], batch["endpoint"], request_id, raw)
        except TimeoutError:
            self._fail(number, raw, "request_timeout", f"no response within {_TIMEOUT_S:g} s")
            return
        except (OSError, http.client.HTTPException):
            self._retry(number, raw, _RETRY_S)
            return
        found = response.headers.get
        pause = float(found("retry-after-ms", 0)) / 1000 or float(found("retry-after", 0))
        if response.status == 401:
            self._status, self._code = "cancelled", "invalid_api_key"
        away = response.status == 503 and _OF_REQUEST not in body
        if away or response.status == 401 or (response.status == 429 and pause):
            self._retry(number, raw, pause or _RETRY_S)
            return
        self._window = min(_MOST_IN_FLIGHT, self._window + 1 / self._window)
        if not found("content-type", "").startswith("application/json") or b"\n" in body:
            body = orjson.dumps(body.decode(errors="replace"))
        values = response.status, orjson.dumps(found("x-request-id", "")), body
        text = b'{"status_code":%d,"request_id":%s,"body":%s}' % values
        self._write(response.status >= 400, lines.output(request_id, raw, text))

    def _retry(self, number: int, raw: bytes, pause: float) -> None:
        """Send a line again after a pause of all lines, and then fewer at a time."""
        self._waiting.append((number, raw))
        now = time.monotonic()
        if now >= self._not_before:  # once for all that were in flight
            self._window = max(1.0, self._window / 2)
        self._not_before = max(self._not_before, now + pause)

    def _fail(self, number: int, raw: bytes, code: str, message: str) -> None:
        error = orjson.dumps({"code": code, "message": message})
        self._write(True, lines.output(lines.request_id(self._batch["id"], number), raw, error=error))

    def _write(self, failed: bool, line: bytes) -> None:
        self._files[failed].write(line)
        self._counts["failed" if failed else "completed"] += 1

    def _look(self) -> None:
        """Store the counts, and see whether the batch must end."""
        self._batch = batch = self._folder.read(self._batch["id"]) or self._batch
        if batch["status"] == "cancelling":
            self._status, self._code = "cancelled", "batch_cancelled"
        elif time.time() >= batch["expires_at"]:
            self._status, self._code = "expired", "batch_expired"
        elif batch["request_counts"] != self._counts:
            self._folder.write(batch | {"request_counts": self._counts})

    def _finish(self, left: Iterable[tuple[int, bytes]]) -> None:
        """Write the lines that did not run, make the outputs files of the API, and end the batch."""
        for number, raw in left:
            self._fail(number, raw, self._code, f"the batch is {self._status}, and this request did not run")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        now = int(time.time())
        batch = self._batch = self._batch | {"status": self._status, "finalizing_at": now, f"{self._status}_at": now}
        batch["request_counts"] = self._counts
        if self._code == "invalid_api_key":
            batch["errors"] = _errors({"code": self._code, "message": "the key of the batch is not valid any more"})
        seconds = (batch["output_expires_after"] or {}).get("seconds", KEPT_S)
        for name, path in zip(("output", "error"), self._paths, strict=True):
            if path.stat().st_size:
                batch[f"{name}_file_id"] = path.name
                self._folder.add_file(path.name, f"{batch['id']}_{name}.jsonl", seconds, "batch_output")
            else:
                path.unlink()
        self._folder.write(batch)


class BatchWorker:
    """Runs all batches of a server: of each owner one at a time, in their order. `stopping`: set it to end `run`."""

    def __init__(self, root: Path, client: Client) -> None:
        self.stopping, self.client, self._root = asyncio.Event(), client, root
        self._turns: dict[str, str] = {}  # id of a batch -> whose turn it uses

    async def run(self) -> None:
        """Work until the end."""
        sweep = 0.0
        async with asyncio.TaskGroup() as running:
            while not self.stopping.is_set():
                for folder, batch in await asyncio.to_thread(self._open):
                    # What sends nothing does not wait for the other batches of its owner.
                    sends = batch["status"] == "in_progress" and time.time() < batch["expires_at"]
                    turn = batch["owner"] if sends else batch["id"]
                    if batch["id"] not in self._turns and turn not in self._turns.values():
                        self._turns[batch["id"]] = turn
                        running.create_task(self._run(folder, batch))
                if time.monotonic() >= sweep:
                    for path in self._root.iterdir():
                        if path.is_dir():
                            await asyncio.to_thread(OwnerFolder(path).sweep)
                    sweep = time.monotonic() + _SWEEP_S
                await self._pause(_TICK_S)

    def _open(self) -> list[tuple[OwnerFolder, Document]]:
        found = []
        for owner, batch_id in (path.name.split(".") for path in self._root.glob("*.batch_*")):
            folder = OwnerFolder(self._root / owner)
            if (batch := folder.read(batch_id)) is not None:
                found.append((folder, batch))
        return sorted(found, key=lambda each: (each[1]["created_at"], each[1]["id"]))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def _run(self, folder: OwnerFolder, batch: Document) -> None:
        try:
            if batch["status"] == "validating":
                batch = await asyncio.to_thread(self._validate, folder, batch)
            elif batch["status"] in ("in_progress", "cancelling"):
                batch = await BatchRun(self, folder, batch).run()
            if batch["status"] not in ("in_progress", "cancelling"):
                folder.marker(batch["id"]).unlink()
                (folder.path / f"{batch['id']}.cancel").unlink(missing_ok=True)
        except Exception:  # as of a full disk: the batch goes on from what is written
            log.exception("batch %s", batch["id"])
            await self._pause(_PAUSE_S)
        finally:
            del self._turns[batch["id"]]

    def _validate(self, folder: OwnerFolder, batch: Document) -> Document:
        total, errors = lines.check(folder.path / batch["input_file_id"], batch["endpoint"])
        status = "failed" if errors else "in_progress"
        changes = {"status": status, f"{status}_at": int(time.time()), "errors": _errors(*errors) if errors else None}
        return folder.write(batch | changes | {"request_counts": batch["request_counts"] | {"total": total}})


def _errors(*errors: dict[str, Any]) -> Document:
    return {"object": "list", "data": errors}


async def _work(settings: dict[str, Any]) -> None:
    root, loop = Path(settings["folder"]), asyncio.get_running_loop()
    worker = BatchWorker(root, Client(settings["url"], settings["secret"]))

    def follow() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(worker.stopping.set)

    threading.Thread(target=follow, daemon=True).start()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "worker.lock").open("w") as lock:
        # Another one still writes what came before its server was killed, or another server has this folder.
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        await worker.run()


def main() -> None:
    """Work until the end of stdin."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server gets them, and decides
    with contextlib.suppress(OSError):  # Linux schedules each session as one group: the server and its engine go first
        Path("/proc/self/autogroup").write_text("10")
    streams.guard()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if line := sys.stdin.buffer.readline():
        asyncio.run(_work(json.loads(line)))
    sys.stderr.flush()
    os._exit(0)  # without waiting for the thread that reads stdin


if __name__ == "__main__":
    main()
