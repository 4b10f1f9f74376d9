"""Step 6, with Docker: build the image with the shipped lock, verify it on the GPU, and serve it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
import servers
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
    if ran.returncode:
        return
    with servers.serving(folder, "image", "--image", tag) as server:
        info = server.info()
        ok = info["device"]["kind"] == ("cpu" if STAND_IN else "cuda")
        step.check(
            "serve --image", ok and server.embed("a text") == 200, f"{info['device']['name']}, {info['attention']}"
        )


if __name__ == "__main__":
    results.run(work)
