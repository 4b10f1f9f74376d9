"""Draws a page with Chromium, without network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.required import missing


def in_browser(page: Path, width: int = 1280) -> str:
    """Return the document after a browser without network has drawn it."""
    if not (browser := shutil.which("chromium")):
        missing("services", "chromium not found")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    profile = page.with_name("profile")
    offline = ["--disable-background-networking", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}"]
    command = [browser, *options, *offline, f"--window-size={width},900", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
