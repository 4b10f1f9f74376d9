"""Breaks what the GPU check should notice. Python imports it in each process of the check: it is on PYTHONPATH."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import sitecustomize  # that of the check, which imports this file


def _padded(module: Any) -> None:
    def varlen_attn(*_: Any, scale: Any = None, window_size: Any = None) -> None:
        raise RuntimeError("injected: no kernel")

    module.varlen_attn = varlen_attn


def _wrapped(after: Any) -> Any:
    """Return a change that lets `after(count, texts, rows)` return the rows of the forward pass."""

    def change(module: Any) -> None:
        launch, count = module.Forward.launch, [0]

        def changed(self: Any, prepared: Any) -> Any:
            count[0] += 1
            number, launched = count[0], launch(self, prepared)
            return replace(launched, read=lambda arrays: after(number, prepared.count, launched.read(arrays)))

        module.Forward.launch = changed

    return change


_kept: list[bytes] = []


def _growing(_: int, __: Any, rows: Any) -> Any:
    _kept.append(b"x" * (1 << 20))
    return rows


def _slow(count: int, _: Any, rows: Any) -> Any:
    end = time.process_time() + (0.4 if count % 25 == 0 else 0)
    while time.process_time() < end:
        pass
    return rows


def _wrong(_: int, texts: int, rows: Any) -> Any:
    import numpy as np

    return np.roll(rows, 1, axis=0) if texts > 15 else rows  # not in the engine's own checks


def _dead(module: Any) -> None:
    module.EncoderEngine.run = lambda *_: os._exit(1)


def _hanging(_: Any) -> None:
    time.sleep(600)


CHANGES: dict[str, tuple[str, Any]] = {
    "padded": ("torch.nn.attention.varlen", _padded),
    "growing": ("inferctl.serve.engines.forward", _wrapped(_growing)),
    "slow": ("inferctl.serve.engines.forward", _wrapped(_slow)),
    "wrong": ("inferctl.serve.engines.forward", _wrapped(_wrong)),
    "dead": ("inferctl.serve.engines.encoder", _dead),
    "hanging": ("inferctl.serve.engines.device", _hanging),
}
fault = os.environ.get("GPU_CHECK_TEST_FAULT")
if fault and hasattr(sitecustomize, "after_import"):  # not in the process that only starts the steps
    sitecustomize.after_import(*CHANGES[fault])
