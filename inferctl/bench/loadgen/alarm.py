"""A precise timer. The event loop's own timers are up to 1 ms late, because epoll counts in milliseconds."""

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
    """Call `on_alarm()` in the event loop at a time on CLOCK_MONOTONIC.

    On Linux it uses a timerfd. Elsewhere it has the precision of the event loop.
    """

    _ABSOLUTE, _MONOTONIC, _FLAGS = 1, 1, os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, on_alarm: Callable[[], None]) -> None:
        self._on_alarm = on_alarm
        self._loop: Any = gevent.get_hub().loop
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._timer: Any = None
        self._file = (
            self._libc.timerfd_create(self._MONOTONIC, self._FLAGS) if hasattr(self._libc, "timerfd_create") else -1
        )
        self.exact = self._file >= 0
        if self.exact:
            self._watcher = self._loop.io(self._file, 1)
            self._watcher.start(self._expired)

    def set(self, at_ns: int) -> None:
        """Set the alarm to `at_ns`, or to now if that is past. It replaces an earlier setting."""
        if self.exact:
            # Setting a timerfd also clears its expiration, so nothing has to be read. A time of 0 would disarm it.
            value = _Interval(0, 0, *divmod(max(at_ns, 1), 1_000_000_000))
            self._libc.timerfd_settime(self._file, self._ABSOLUTE, ctypes.byref(value), None)
            return
        if self._timer:
            self._timer.close()
        self._timer = self._loop.timer(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))
        self._timer.start(self._on_alarm)

    def disarm(self) -> None:
        """Cancel the alarm."""
        if self.exact:
            self._libc.timerfd_settime(self._file, 0, ctypes.byref(_Interval(0, 0, 0, 0)), None)
        elif self._timer:
            self._timer.close()
            self._timer = None

    def close(self) -> None:
        self.disarm()
        if self.exact:
            self._watcher.stop()
            self._watcher.close()
            os.close(self._file)

    def _expired(self) -> None:
        self.disarm()
        self._on_alarm()
