"""The keys of cached vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import inferctl
from inferctl.serve.engine_process.engine_protocol import EngineInfo, Tokens
from inferctl.serve.task_config import TaskConfig

KEY_BYTES = 16
# Scopes whose seeds are kept. Another one costs one more hash per request.
_SCOPES = 16_384


def identity(model_sha256: str, config: TaskConfig, info: EngineInfo) -> dict[str, Any]:
    """Return all that determines a row except its token ids and its mark.

    The device is not part of it: servers on different GPUs share entries if they compute in the same precision. The
    requested precision is not either, because its result counts.
    """
    precision = info.precision
    return {
        "inferctl": inferctl.__version__,
        "versions": info.versions,
        "model": model_sha256,
        "config": asdict(config),
        "precision": [precision.effective, precision.method, precision.tf32],
        "attention": info.attention,
        "dimensions": info.dimensions,
    }


class KeySpace:
    """Makes the keys of one model as one server computes it.

    `identity`: as the function of this name returns it. Servers with equal identities make equal keys.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        canonical = json.dumps(identity, sort_keys=True).encode()
        root = blake2b(canonical, digest_size=32).digest()
        self._seed = lru_cache(maxsize=_SCOPES)(
            # `None` and "" differ, so a scope never equals the absence of one.
            lambda scope: blake2b(b"" if scope is None else b"s" + scope.encode(), key=root, digest_size=32).digest()
        )

    def keys(self, scope: str | None, sequences: Sequence[Tokens], marks: Sequence[int] | None = None) -> list[bytes]:
        """Return the key of each sequence of token ids (int32): 128 bits.

        `scope`: who shares the entries; None for callers without a scope. `marks`: as in `Batch`.
        """
        seed = self._seed(scope)
        # Token ids are chosen by clients, so marks are not appended to them: both would be the content of other ids.
        persons = [b""] * len(sequences) if marks is None else [mark.to_bytes(8, "little") for mark in marks]
        return [
            blake2b(ids.tobytes(), key=seed, digest_size=KEY_BYTES, person=person).digest()
            for ids, person in zip(sequences, persons, strict=True)
        ]
