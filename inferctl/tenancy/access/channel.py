"""What an API process and its relay say to each other: lines of JSON over a Unix socket in `access.data`.

The first line of the API process is the name of its servers, which share limits. Then both send counters of limits. The
relay passes on what comes from other servers, and the ids of keys that were revoked. It keeps nothing, so either side
may end and start again at any time. Whoever connects sends `AGAIN`, as messages may have been lost before: then every
server sends all of its counters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inferctl.tenancy.access.limits import Counters
from inferctl.tenancy.access.window import CELLS, Cells

INTERVAL_S = 0.1
AGAIN = b'{"again": true}\n'
MAX_LINE = 1_000_000  # NATS accepts 1 MiB
# In one message. The counters of a key that changed have up to 1 KB.
_KEYS = 1000
_MOST_CELLS = 2 * CELLS  # a window, and another one for clocks that are ahead
_MAX_ID = 200
_MOST = 1 << 53
_SOCKET = "relay.sock"
_MAX_PATH = 100  # a socket can have 107 bytes


def address(folder: Path) -> str:
    """Return the path of the socket in `folder`, which exists. Raises `OSError`."""
    path = str(folder.absolute() / _SOCKET)
    if len(os.fsencode(path)) <= _MAX_PATH:
        return path
    # Never closed: there is one folder for each process.
    return f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}/{_SOCKET}"


def messages(
    sender: str, counted_by: str, counters: Counters, sent_up_to: float, now: float
) -> Iterator[dict[str, Any]]:
    """Yield counters as messages; one without counters if there are none.

    `counted_by`: the server that charged; `sender`: the one that says so, at `now`. It sent all that it counted up to
    `sent_up_to`.
    """
    items = list(counters.items())
    for first in range(0, len(items) or 1, _KEYS):
        part = {
            key_id: [[[cell, *counts] for cell, counts in cells.items()] for cells in both]
            for key_id, both in items[first : first + _KEYS]
        }
        yield {"sender": sender, "sent": sent_up_to, "clock": now, "counted_by": counted_by, "counters": part}


def counters(message: dict[str, Any]) -> Counters:
    """Return the counters in a message. Raises `ValueError` and others if it is not one that a server sends."""
    found: Counters = {}
    if len(message["counters"]) > _KEYS:
        raise ValueError("too many keys")
    for key_id, (requests, tokens) in message["counters"].items():
        if len(key_id) > _MAX_ID:
            raise ValueError("not the id of a key")
        found[key_id] = _cells(requests), _cells(tokens)
    return found


def _cells(items: list[list[int]]) -> Cells:
    if len(items) > _MOST_CELLS:
        raise ValueError("too many cells")
    found: Cells = {}
    for cell, charged, returned in items:
        # `type`: neither bool nor float.
        if not type(cell) is type(charged) is type(returned) is int or not 0 <= returned <= charged < _MOST:
            raise ValueError("not a counter")
        found[cell] = charged, returned
    return found
