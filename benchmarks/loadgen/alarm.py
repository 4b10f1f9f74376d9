"""A timer that is on time. The event loop's own timers are up to a millisecond late, because epoll counts in milliseconds."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import gevent


class _Interval(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


class Alarm:
    """Calls `ring()` in the event loop at a time on CLOCK_MONOTONIC: through a timerfd on Linux, else with the loop's own precision."""

    _ABSOLUTE, _MONOTONIC, _FLAGS = 1, 1, os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop: Any = gevent.get_hub().loop
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._timer: Any = None
        self._file = (
            self._libc.timerfd_create(self._MONOTONIC, self._FLAGS) if hasattr(self._libc, "timerfd_create") else -1
        )
        self.exact = self._file >= 0
        if self.exact:
            self._watcher = self._loop.io(self._file, 1)
            self._watcher.start(self._rung)

    def set(self, at_ns: int) -> None:
        """Ring at `at_ns`, or at once when that is past; replaces what was set before."""
        if self.exact:
            # Setting a timer also forgets that it rang, so nothing has to be read. A time of 0 would switch it off.
            value = _Interval(0, 0, *divmod(max(at_ns, 1), 1_000_000_000))
            self._libc.timerfd_settime(self._file, self._ABSOLUTE, ctypes.byref(value), None)
            return
        if self._timer:
            self._timer.close()
        self._timer = self._loop.timer(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))
        self._timer.start(self._ring)

    def off(self) -> None:
        """Do not ring."""
        if self.exact:
            self._libc.timerfd_settime(self._file, 0, ctypes.byref(_Interval(0, 0, 0, 0)), None)
        elif self._timer:
            self._timer.close()
            self._timer = None

    def close(self) -> None:
        self.off()
        if self.exact:
            self._watcher.stop()
            self._watcher.close()
            os.close(self._file)

    def _rung(self) -> None:
        self.off()
        self._ring()
