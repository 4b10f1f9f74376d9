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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter

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
from inferctl.serve.engines import cpu

log = logging.getLogger("inferctl.engine")

_SCHEMA = "inferctl.checks/1"
_BEGIN = f'{{"schema": "{_SCHEMA}"'
# Of the vectors of all tokens of the check texts, the longest rows. Another file may have any size.
_MAX_BYTES = 2**28
# Next to torch and transformers, they compute tokens and results.
_LIBRARIES = ("tokenizers", "bitsandbytes", "numpy")
# Variables of libraries that select kernels or number formats: `ONEDNN_DEFAULT_FPMATH_MODE=BF16` computes fp32 in bf16.
_VARIABLES = re.compile(r"(?:ATEN|CUBLAS|DNNL|MKL|NVIDIA_TF32|ONEDNN|OPENBLAS|PYTORCH|TORCH)_\w+")
_ENGINE = TypeAdapter(EngineInfo)


@dataclass(frozen=True)
class CheckRecord:
    """A record. `identity`: of what it is. `expected`: fp32 results, None if the model is too large for them.

    `engines`: what an engine found (`EngineInfo` as JSON), by hardware and settings.
    """

    identity: str
    expected: Rows | None = None
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def has_results(self) -> bool:
        """Whether a start can use it."""
        return self.expected is not None or bool(self.engines)

    def engine(self, hardware: str, precision: PrecisionInfo) -> EngineInfo | None:
        """Return what an engine found on equal hardware; None if there was none."""
        if (found := self.engines.get(hardware)) is None:
            return None
        info = _ENGINE.validate_python(found)
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
        [_version(name) for name in _LIBRARIES],
    ]
    return _sha256(parts)


def hardware(config: EngineConfig, device: DeviceInfo) -> str:
    """Return a digest of the device with its driver or instructions, and of the settings of an engine."""
    processor = cpu.fields()
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    driver = Path("/proc/driver/nvidia/version")
    parts = [
        [device.kind, device.name, device.compute_capability, device.threads, device.count],
        [processor.get(name) for name in kept] if device.kind == "cpu" else driver.exists() and driver.read_text(),
        [config.precision, config.device, config.max_batch_tokens, config.engines, config.allow_inaccurate],
        {name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)},
    ]
    return _sha256(parts)


def empty(config: EngineConfig) -> CheckRecord:
    """Return a record with nothing in it."""
    return CheckRecord(identity(config))


def read(config: EngineConfig) -> CheckRecord:
    """Return the record in the file of the configuration; an empty one if it has none for this model and this code."""
    found, file = empty(config), Path(config.check_record or "")
    try:
        if not file.is_file():
            return found
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        document = json.loads(data)
        seal, wanted = document.pop("seal"), (_SCHEMA, found.identity)
        if seal != _sha256(document):
            raise ValueError("its seal does not match its content")
        if (document["schema"], document["identity"]) != wanted:
            return found
        rows = document["expected"]
        expected = None
        if rows is not None:
            expected, _ = unpack_rows(rows["count"], rows["width"], base64.b64decode(rows["values"]), 0)
        return CheckRecord(found.identity, expected, dict(document["engines"]))
    except Exception as error:  # noqa: BLE001  # the file can have any content
        log.warning("the record of checks %s is ignored: %s", file, error)
        return found


def write(config: EngineConfig, record: CheckRecord, hardware_key: str, info: EngineInfo) -> None:
    """Write the record with what an engine found to the file of the configuration, if that is possible.

    An image and a mounted configuration are read-only: their record stays as it is, without a warning. A file that
    is no record stays, too.
    """
    rows = None
    if record.expected is not None:
        count, width, values = pack_rows(record.expected)
        rows = {"count": count, "width": width, "values": base64.b64encode(values).decode()}
    # Without what depends on the load of the machine, and is measured again.
    found = replace(info, batch_tokens=config.max_batch_tokens, parallel=1)
    engines = record.engines | {hardware_key: found.to_json()}
    document = {"schema": _SCHEMA, "identity": record.identity, "expected": rows, "engines": engines}
    file = Path(config.check_record or "")
    try:
        if not _is_replaceable(file):
            log.warning("the record of checks is not written: %s is no record", file)
            return
        outputs.replace(file.resolve(), json.dumps({**document, "seal": _sha256(document)}) + "\n")
    except OSError as error:
        level = logging.INFO if error.errno in (errno.EROFS, errno.EACCES) else logging.WARNING
        log.log(level, "the record of checks %s is not written: %s", file, error.strerror)


def _is_replaceable(file: Path) -> bool:
    """Return whether `file` is missing, empty or a record: another one, such as /dev/null, has another purpose."""
    if not file.exists():
        return True
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_BEGIN)).decode(errors="replace") in ("", _BEGIN)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
