"""A precise timer. The event loop's own timers are up to 1 ms late, because epoll counts in milliseconds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import gevent


class _Interval(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


class Alarm:
    """Call `on_alarm()` in the event loop at a time on CLOCK_MONOTONIC, with a timerfd of Linux."""

    _ABSOLUTE, _MONOTONIC, _FLAGS = 1, 1, os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, on_alarm: Callable[[], None]) -> None:
        self._on_alarm = on_alarm
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(self._MONOTONIC, self._FLAGS)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._watcher: Any = gevent.get_hub().loop.io(self._file, 1)
        self._watcher.start(self._expired)

    def set(self, at_ns: int) -> None:
        """Set the alarm to `at_ns`, or to now if that is past. It replaces an earlier setting."""
        # Setting a timerfd also clears its expiration, so nothing has to be read. A time of 0 would disarm it.
        value = _Interval(0, 0, *divmod(max(at_ns, 1), 1_000_000_000))
        self._libc.timerfd_settime(self._file, self._ABSOLUTE, ctypes.byref(value), None)

    def disarm(self) -> None:
        """Cancel the alarm."""
        self._libc.timerfd_settime(self._file, 0, ctypes.byref(_Interval(0, 0, 0, 0)), None)

    def _expired(self) -> None:
        self.disarm()
        self._on_alarm()
