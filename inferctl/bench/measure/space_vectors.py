"""What a server says of its vector spaces, and its vectors of texts, to compare two of them."""

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
    versions = {name: each for name, each in (info.get("versions") or {}).items() if name != "python"}
    return {
        "precision": precision.get("effective"),
        "device": device.get("name") or device.get("kind"),
        "attention": info.get("attention"),
        "inferctl": info.get("inferctl"),
        **versions,
    }


def vectors(server: ServerConnection, texts: Sequence[str]) -> Vectors:
    """Return the vectors of the first output of a model, of texts as queries and as documents.

    Only inferctl is told what they are, and truncates them.
    Raises `InferctlError`.
    """
    if server.task != "embed":
        raise UsageError(f"{server.url} serves a model for {server.task}, which has no vectors", "name another server")
    model = server.info.get("model") or {}
    own = "inferctl" in server.info
    prompts = (model.get("prompts") or {}).get("names") or []
    sides = (
        [{"input_type": role} for role in ("query", "document")]
        if own and (prompts or server.output != "dense")
        else [{}]
    )
    found = []
    for options in ({**side, **({"truncate": True} if own else {})} for side in sides):
        rows: list[Sequence[float]] = []
        for start in range(0, len(texts), _BATCH):
            rows += server.embed(list(texts[start : start + _BATCH]), **options)
        matrix = padded(rows)
        if not np.isfinite(matrix).all():
            raise InferctlError(f"{server.url} returned vectors with NaN or infinity", "see the log of the server")
        found.append(matrix)
    per_token = int(model["token_dimensions"]) if server.output == "tokens" else None
    return Vectors(found[0], found[-1], sparse=server.output == "sparse", per_token=per_token)
