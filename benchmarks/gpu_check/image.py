"""Step 6, with Docker: build the image with the shipped lock, and verify it on the GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from results import STAND_IN, Step

import models


def work(step: Step, settings: dict[str, Any]) -> None:
    folder = Path(settings["work"])
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        step.skip("image", "no Docker Engine responds")
        return
    model = models.make(folder / "shape-minilm", "bert", **models.SHAPES["minilm"])
    step.part("image", 200, _image, folder, model, "cpu" if STAND_IN else "cuda13.0")


def _image(step: Step, folder: Path, model: Path, base: str) -> None:
    tag = "inferctl-gpu-check:local"
    command = [sys.executable, "-m", "inferctl", "build", "--model", str(model), "--base", base, "--tag", tag]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=step.left() - 60, cwd=folder)
    step.check("build and verification", ran.returncode == 0, " ".join((ran.stderr or ran.stdout).split())[-300:])


if __name__ == "__main__":
    results.run(work)
