"""Runs Envoy: checks its configuration, starts it, restarts it, and drains it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from inferctl.core import core_files, outputs
from inferctl.core.errors import NotReadyError, UsageError, install_hint
from inferctl.gateway import admin, config
from inferctl.gateway.servers import Server

_READY_S = 30.0
# An Envoy that runs this long is started again at once when it ends.
_STABLE_S = 2.0
_LOG_LINE = re.compile(r"^\[[^\]]*\]\[\d+\]\[(?P<level>\w+)\]\[[^\]]*\] (?:\[[^\]]*\] )?(?P<text>.*)$")


def binary() -> str:
    """Return the path of Envoy. Raises `NotReadyError` if it is not installed."""
    of_python = Path(sys.executable).with_name("envoy")
    found = str(of_python) if of_python.is_file() else shutil.which("envoy")
    if found is None:
        raise NotReadyError("Envoy is not installed", f"{install_hint('gateway')}, or put `envoy` on the PATH")
    return found


class Gateway:
    """One Envoy in front of `servers`, and its files.

    `notify` gets lines for people. `announce`: a file that is written when the gateway is ready. `threads`: of Envoy.
    """

    def __init__(
        self,
        settings: config.Settings,
        servers: Sequence[Server],
        notify: Callable[[str], None],
        *,
        threads: int = 1,
        drain_s: float = 25.0,
        announce: Path | None = None,
    ) -> None:
        self._settings, self._servers, self._notify, self._announce = settings, servers, notify, announce
        self._threads, self._drain_s = threads, drain_s
        self._binary = binary()
        self._tail: deque[str] = deque(maxlen=100)
        self._stopping = asyncio.Event()
        self._interrupted = False

    def _handle_signal(self, number: int) -> None:
        if self._stopping.is_set():  # the second signal
            self._process.kill()
        self._interrupted |= number == signal.SIGINT
        self._stopping.set()

    async def run(self, connect_signals: Callable[[Callable[[int], None]], None]) -> int:
        """Serve until a signal arrives. Returns the exit code. Raises `NotReadyError` and `UsageError`."""
        core_files.disable()
        with tempfile.TemporaryDirectory(prefix="inferctl-gateway-") as name:
            self._folder = Path(name)
            self._admin = self._folder / "admin"
            self._write_files()
            self._check_port()
            await self._start()
            try:
                connect_signals(self._handle_signal)
                await self._wait_ready()
                await self._serve()
                await self._drain()
            finally:
                await self._end()
        self._notify("stopped")
        return 130 if self._interrupted else 0

    def _write_files(self) -> None:
        if self._settings.certificate:
            (self._folder / "tls").mkdir()
            _replace(self._folder / "tls" / "certificate.yaml", config.certificates(self._settings))
        file = self._write_config()
        done = subprocess.run(
            [self._binary, "-c", str(file), "--mode", "validate", "--log-level", "error"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UsageError(f"Envoy rejects the configuration: {_reason(done.stderr.splitlines())}")

    def _write_config(self) -> Path:
        file = self._folder / "envoy.yaml"
        _replace(file, config.bootstrap(self._settings, self._folder, self._servers))
        return file

    def _check_port(self) -> None:
        """Raise `NotReadyError` if the port is taken. Envoy's own message does not say which one."""
        settings = self._settings
        listeners = [("--port", settings.host, settings.port)]
        if settings.metrics_port is not None:
            listeners.append(("--metrics-port", "127.0.0.1", settings.metrics_port))
        for option, host, port in listeners:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    taken = error.errno == errno.EADDRINUSE
                    why = "the port is taken" if taken else (error.strerror or str(error)).lower()
                    hint = f"pass another one with `{option}`"
                    raise NotReadyError(f"cannot listen on {host}:{port}: {why}", hint) from None

    async def _start(self) -> None:
        command = [self._binary, "-c", str(self._folder / "envoy.yaml"), "--concurrency", str(self._threads)]
        command += ["--disable-hot-restart", "--log-level", "warning", "--drain-time-s", str(round(self._drain_s) or 1)]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to inferctl, which drains first
        )
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stderr
        while data := await self._process.stderr.readline():
            line = data.decode(errors="replace").rstrip()
            self._tail.append(line)
            found = _LOG_LINE.match(line)
            if found and found["level"] in ("error", "critical"):
                self._notify(f"envoy: {found['text']}")

    async def _wait_ready(self) -> None:
        limit = time.monotonic() + _READY_S
        while time.monotonic() < limit and not self._stopping.is_set():
            if self._process.returncode is not None:
                break
            with contextlib.suppress(OSError):
                status, _ = await asyncio.to_thread(admin.call, self._admin, "/ready")
                if status == 200:
                    break
            await asyncio.sleep(0.05)
        else:
            if not self._stopping.is_set():
                raise NotReadyError(f"Envoy was not ready after {_READY_S:g} s", "see its messages above")
        if self._process.returncode is not None:
            raise NotReadyError(f"Envoy ended during its start: {_reason(self._tail)}", "see its messages above")
        if not self._stopping.is_set():
            port = await asyncio.to_thread(admin.port_of, self._admin, "clients")
            if port != self._settings.port:  # it was a free one: an Envoy that is started again has the same
                self._settings = replace(self._settings, port=port)
                self._write_config()
            host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._settings.host, self._settings.host)
            url = f"{'https' if self._settings.certificate else 'http'}://{host}:{port}"
            self._notify(f"ready      {url}")
            self._notify(f"servers    {', '.join(map(str, self._servers))}")
            if not await asyncio.to_thread(admin.stat, self._admin, "cluster.servers.membership_healthy"):
                self._notify("warning: none of the servers is ready; requests get 503 until one is ready")
            if self._announce:
                outputs.announce(self._announce, url)

    async def _serve(self) -> None:
        delay_s = 0.0
        while not self._stopping.is_set():
            ended = asyncio.create_task(self._process.wait())
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait((ended, stop), timeout=_STABLE_S, return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            stop.cancel()
            if self._stopping.is_set():
                return
            if self._process.returncode is not None:
                self._notify(f"warning: Envoy ended ({_ending(self._process.returncode)}); starting it again")
                await asyncio.sleep(delay_s)
                delay_s = min(10.0, 2 * delay_s or 0.5)
                await self._start()
                with contextlib.suppress(NotReadyError):  # the next turn tries again
                    await self._wait_ready()
            else:
                delay_s = 0.0

    async def _drain(self) -> None:
        """Finish the requests in flight: Envoy alone drops them on SIGTERM."""
        if self._process.returncode is not None:
            return
        limit = time.monotonic() + self._drain_s
        with contextlib.suppress(OSError):
            active = await asyncio.to_thread(admin.stat, self._admin, "http.clients.downstream_rq_active")
            self._notify(f"shutting down; requests in flight: {active}; a second signal stops at once")
            for target in ("/healthcheck/fail", "/drain_listeners?graceful&skip_exit"):
                await asyncio.to_thread(admin.call, self._admin, target, "POST")
            while active and time.monotonic() < limit and self._process.returncode is None:
                await asyncio.sleep(0.1)
                active = await asyncio.to_thread(admin.stat, self._admin, "http.clients.downstream_rq_active")
            if active:
                self._notify(f"stopped after {self._drain_s:g} s; requests without a response: {active}")

    async def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await self._reading


def _replace(file: Path, content: object) -> None:
    """Replace a file by a rename, which is what Envoy watches. JSON is YAML."""
    outputs.replace(file, json.dumps(content, indent=1))


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _reason(lines: Sequence[str]) -> str:
    """Return the last error of Envoy's log, else its last line."""
    texts = [(found["level"], found["text"]) for line in lines if (found := _LOG_LINE.match(line))]
    errors = [text for level, text in texts if level in ("error", "critical")]
    return (errors or [text for _, text in texts] or [*lines] or ["it printed nothing"])[-1][:500]
