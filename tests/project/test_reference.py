"""The pages of docs/reference/ are those that the program would write: keys, metrics, endpoints and rules."""

from __future__ import annotations

import importlib.util
from pathlib import Path

WRITER = Path(__file__).resolve().parents[2] / "docs" / "write_reference.py"


def test_the_reference_matches_the_program() -> None:
    located = importlib.util.spec_from_file_location("write_reference", WRITER)
    assert located and located.loader
    module = importlib.util.module_from_spec(located)
    located.loader.exec_module(module)
    written = {page.name: page.read_text(encoding="utf-8") for page in module.TARGET.glob("*.md")}
    written.pop("commands.md", None)
    assert written == module.pages(), "`make reference` regenerates them"
