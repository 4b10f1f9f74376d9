"""Keeps what the checks at the start found, so that a later start of the same model and code need not repeat them.

A record has two parts. The fp32 results of the check texts are valid on any hardware: a start with them computes and
compares its own results, without loading the weights in fp32. What an engine found, such as whether packed attention is
right, is valid only on equal hardware with equal settings; then a start compares nothing.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from inferctl.core import assets, outputs
from inferctl.serve.engine_process.engine_protocol import (
    DeviceInfo,
    EngineConfig,
    EngineInfo,
    PrecisionInfo,
    Rows,
    pack_rows,
    unpack_rows,
)

log = logging.getLogger("inferctl.engine")

_SCHEMA = "inferctl.checks/1"
# They change the kernels of a CPU or a GPU.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class CheckRecord:
    """A record. `identity`: of what it is. `expected`: fp32 results, None if the model is too large for them.

    `engines`: what an engine found (`EngineInfo` as JSON), by hardware and settings.
    """

    identity: str
    expected: Rows | None = None
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def engine(self, hardware: str, precision: PrecisionInfo) -> EngineInfo | None:
        """Return what an engine found on equal hardware; None if there was none."""
        if (found := self.engines.get(hardware)) is None:
            return None
        info = EngineInfo.from_json(found)
        return replace(info, check=f"{info.check}, from a record") if info.precision == precision else None


def identity(config: EngineConfig) -> str:
    """Return a digest of what fp32 results depend on, besides the rounding of the hardware."""
    parts = [
        assets.code_digest(),
        config.model_sha256,
        config.task,
        config.max_input_tokens,
        torch.__version__,
        transformers.__version__,
    ]
    return _sha256(parts)


def hardware(config: EngineConfig, device: DeviceInfo) -> str:
    """Return a digest of the device with its driver or instructions, and of the settings of an engine."""
    cpu = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*:(.*)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE))
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    driver = Path("/proc/driver/nvidia/version")
    parts = [
        [device.kind, device.name, device.compute_capability, device.threads, device.count],
        [fields.get(name) for name in kept] if device.kind == "cpu" else driver.exists() and driver.read_text(),
        [config.precision, config.device, config.max_batch_tokens, config.engines, config.allow_inaccurate],
        [os.environ.get(name) for name in _VARIABLES],
    ]
    return _sha256(parts)


def read(config: EngineConfig) -> CheckRecord:
    """Return the record in the file of the configuration; an empty one if it has none for this model and this code."""
    empty, file = CheckRecord(identity(config)), Path(config.check_record or "")
    if not file.is_file():
        return empty
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        seal, wanted = document.pop("seal"), (_SCHEMA, empty.identity)
        if seal != _sha256(document):
            raise ValueError("its seal does not match its content")
        if (document["schema"], document["identity"]) != wanted:
            return empty
        rows = document["expected"]
        expected = None
        if rows is not None:
            expected, _ = unpack_rows(rows["count"], rows["width"], base64.b64decode(rows["values"]), 0)
        return CheckRecord(empty.identity, expected, dict(document["engines"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("the record of checks %s is ignored: %s", file, error)
        return empty


def write(config: EngineConfig, record: CheckRecord, hardware_key: str, info: EngineInfo) -> None:
    """Write the record with what an engine found to the file of the configuration, if that is possible.

    An image and a mounted configuration are read-only: their record stays as it is, without a warning.
    """
    rows = None
    if record.expected is not None:
        count, width, values = pack_rows(record.expected)
        rows = {"count": count, "width": width, "values": base64.b64encode(values).decode()}
    engines = record.engines | {hardware_key: info.to_json()}
    document = {"schema": _SCHEMA, "identity": record.identity, "expected": rows, "engines": engines}
    file = Path(config.check_record or "")
    try:
        outputs.replace(file, json.dumps({**document, "seal": _sha256(document)}) + "\n")
    except OSError as error:
        level = logging.INFO if error.errno in (errno.EROFS, errno.EACCES) else logging.WARNING
        log.log(level, "the record of checks %s is not written: %s", file, error.strerror)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
