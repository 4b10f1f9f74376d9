"""Clients that chat with a server in the network of a pod, and how each of their requests ended."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.deploy.containers import Network

COMPLETE = "complete"
_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "ignore_eos": True}


@dataclass
class Chat:
    """One request. `ending`: `COMPLETE`, the code of an error, or what is wrong with an end without an error."""

    ending: str = ""
    tokens: int = 0
    ended: float = field(default_factory=time.monotonic)


def chat(client: httpx.Client, url: str, *, stream: bool, **options: Any) -> Chat:
    """Send one chat and read its response to the end."""
    body = {**_BODY, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {}), **options}
    found = Chat()
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if stream and response.status_code == 200:
                lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            else:
                lines = [response.read().decode()]
        found.ending, found.tokens = _ending(lines, stream=stream, choices=options.get("n", 1))
    except httpx.HTTPError as error:
        found.ending = repr(error)
    found.ended = time.monotonic()
    return found


def _ending(lines: list[str], *, stream: bool, choices: int) -> tuple[str, int]:
    done = lines[-1] == "[DONE]"
    documents = [json.loads(line) for line in lines if line != "[DONE]"]
    for document in documents:
        if "error" in document:
            return str(document["error"]["code"]), 0
    reasons = [choice["finish_reason"] for each in documents for choice in each["choices"] if choice["finish_reason"]]
    usage = documents[-1]["usage"]
    if done != stream or reasons != ["length"] * choices or not usage:
        return f"silent end: {lines[-1][:200]}", 0
    return COMPLETE, int(usage["completion_tokens"])


class Chats:
    """Clients in the network of a pod. `finished`: their requests, in the order of their ends."""

    def __init__(self, network: Network, url: str, headers: dict[str, str]) -> None:
        self._network, self._url, self._headers = network, url, headers
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.finished: list[Chat] = []

    def start(self, *, once: bool = False, **options: Any) -> None:
        """Start a client that sends a chat, and the next one as soon as it is answered, until `stop`."""

        def client() -> None:
            self._network.enter()
            with httpx.Client(headers=self._headers, timeout=120) as connection:
                while not self._stopping.is_set():
                    self.finished.append(chat(connection, self._url, **options))
                    if once:
                        break

        self._threads.append(threading.Thread(target=client))
        self._threads[-1].start()

    def stop(self) -> None:
        """Send no new requests. `wait` waits for the last responses."""
        self._stopping.set()

    def wait(self) -> list[Chat]:
        """Return the requests of all clients when the last one ended."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        return self.finished
