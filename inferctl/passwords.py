"""Passwords in addresses, which belong neither into messages nor into files."""

from __future__ import annotations

import re

_OF_USER = re.compile(r"(://[^/:@\s]*):[^/\s]*@")
_OF_QUERY = re.compile(r"([?&](?:ssl)?password=)[^&\s]*")
# NATS has tokens in place of users.
_TOKEN = re.compile(r"(nats://)[^/:@\s]+@")


def hide(text: str) -> str:
    """Return an address with `***` in place of its passwords and of a token of NATS."""
    return _TOKEN.sub(r"\1***@", _OF_QUERY.sub(r"\1***", _OF_USER.sub(r"\1:***@", text)))


def remove(text: str) -> str:
    """Return an address without its passwords and without a token of NATS."""
    public = re.sub(r"([?&])(?:ssl)?password=[^&]*&?", r"\1", _OF_USER.sub(r"\1@", text))
    return _TOKEN.sub(r"\1", public).rstrip("?&")
