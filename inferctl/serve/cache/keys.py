"""The keys of cached vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from inferctl.reading.rows import Tokens

KEY_BYTES = 16
# Scopes whose seeds are kept. Another one costs one more hash per request.
_SCOPES = 16_384


class KeySpace:
    """Makes the keys of one cache. They differ from those of each other cache, so no client can find equal ones."""

    def __init__(self) -> None:
        root = os.urandom(32)
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
