"""The usage events of generation: the edge in vLLM's API process has an outbox, and the server has the relay."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from inferctl.tenancy.metering.ledger import Ledger
from tests.processes import until
from tests.serve.test_generation import Start, llama, start  # noqa: F401  # fixtures

ALL = (0, 2**62)


def test_generated_tokens_reach_the_ledger_also_if_vllm_is_killed(start: Start, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "m"
    server = start(INFERCTL_METERING_MODE="on", INFERCTL_METERING_DATA=str(data))
    used = [server.chat("ok").usage for _ in range(3)]
    until(lambda: server.metric("inferctl_outbox_events") == 0, 30)
    vllm = next(
        pid for pid in server.children() if b"inferctl.tenancy.relay" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(vllm, signal.SIGKILL)
    until(lambda: "vLLM is ready again" in server.log.read_text(), 60)
    used.append(server.chat("ok").usage)
    assert server.stop() == 0, server.log.read_text()
    ledger = Ledger.read(f"sqlite:///{data}/ledger.sqlite")
    rows = ledger.usage(["model", "task", "endpoint", "status"], *ALL)
    (row,) = [row for row in rows if (row["endpoint"], row["status"]) == ("chat", 200)]
    assert (row["model"], row["task"], row["requests"]) == ("m", "generate", 4)
    assert row["input_tokens"] == sum(each.prompt_tokens for each in used) > 0
    assert row["output_tokens"] == sum(each.completion_tokens for each in used) > 0
    assert ledger.gaps(*ALL) == []
    assert len(ledger.unclean_ends(*ALL)) == 1, "the killed process; the others ended by themselves"
    ledger.close()
