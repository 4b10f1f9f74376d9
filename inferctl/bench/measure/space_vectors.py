"""What a server says of its execution, and its vectors of texts, to compare two vector spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inferctl.bench.judge.neighbors import padded
from inferctl.bench.judge.space_change import Vectors
from inferctl.bench.load.target import ServerConnection
from inferctl.core.errors import InferctlError, UsageError

_BATCH = 32


def execution(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a server computes, from its `GET /info`: what is no part of the definition of a space."""
    precision, device = info.get("precision") or {}, info.get("device") or {}
    known = {"precision": precision.get("effective"), "device": device.get("name"), "attention": info.get("attention")}
    return known | {"inferctl": info.get("inferctl")} | (info.get("versions") or {})


def vectors(server: ServerConnection, texts: Sequence[str]) -> Vectors:
    """Return the vectors of the first output of a model, of texts as queries and as documents.

    inferctl truncates long texts, and gets to know which ones are queries if its model has prompts. Other servers do
    what they do without that. Raises `InferctlError`.
    """
    if server.task != "embed":
        raise UsageError(f"{server.url} serves a model for {server.task}, which has no vectors", "name another server")
    model, found = server.info.get("model") or {}, []
    options: dict[str, Any] = {"truncate": True} if "inferctl" in server.info else {}
    has_roles = options and ((model.get("prompts") or {}).get("names") or server.output != "dense")
    for role in ("query", "document") if has_roles else (None,):
        options |= {"input_type": role} if role else {}
        parts = (list(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH))
        found.append(padded([row for part in parts for row in server.embed(part, **options)]))
    if not all(np.isfinite(each).all() and (each.any(axis=1).all() or server.output == "sparse") for each in found):
        raise InferctlError(f"{server.url} returned vectors of zeros, NaN or infinity", "see the log of the server")
    per_token = int(model["token_dimensions"]) if server.output == "tokens" else None
    return Vectors(found[0], found[-1], sparse=server.output == "sparse", per_token=per_token)
