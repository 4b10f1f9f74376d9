"""Installs packages for tests that need others than those of the development environment."""

import subprocess
import sys
from pathlib import Path


def install(python: Path | str, *arguments: str) -> None:
    """Install packages for a Python interpreter: with uv, or with pip where only pip can reach its index."""
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    if subprocess.run([*uv, *arguments], check=False).returncode:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", "--no-compile", *arguments], check=True)
