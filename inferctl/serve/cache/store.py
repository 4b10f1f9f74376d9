"""The vectors in the memory of one server."""

from __future__ import annotations

from collections.abc import Callable

from inferctl.core.errors import NotReadyError, install_hint

# Memory of an entry beyond its vector: its key and the structures of the library, as measured.
ENTRY_BYTES = 512


class VectorStore:
    """Vectors (float32, as bytes) by key, in at most about `size_bytes`. The library decides by TinyLFU what stays.

    `get(key)` returns a vector, None if it is not stored; `put(key, vector)` stores one.
    """

    def __init__(self, size_bytes: int) -> None:
        """Raises `NotReadyError` if the library is not installed."""
        try:
            from moka_py import Moka
        except ModuleNotFoundError as error:
            raise NotReadyError(
                f"cache.size requires the package {error.name}, not installed", install_hint("cache")
            ) from None

        self._cache: Moka[bytes, bytes] = Moka(size_bytes, weigher=lambda _, vector: len(vector) + ENTRY_BYTES)
        self.get: Callable[[bytes], bytes | None] = self._cache.get
        self.put = self._cache.set

    @property
    def bytes(self) -> int:
        """Memory of all entries."""
        self._cache.run_pending_tasks()  # otherwise the last changes are not counted
        return self._cache.weighted_size()
