"""Checks the documentation against the program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from inferctl import cli
from tests.processes import execute, python

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("inferctl", "tests", "benchmarks", "docs")
# What a team lead who pays by usage types into the search.
SEARCHED = ("disconnected", "client", "charged")
FILES = [f"/{file.relative_to(ROOT).as_posix()}" for top in SOURCES for file in (ROOT / top).rglob("*.py")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as forges generate them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_are_valid(page: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if "://" in name:
            continue
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name} links to {name}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_files_and_commands_a_page_names_exist(page: Path) -> None:
    """A page may shorten a path to its last parts: `serve/start.py` for `inferctl/serve/start.py`."""
    for name in re.findall(r"[\w./-]*\w\.py\b", page.read_text(encoding="utf-8")):
        assert any(file.endswith(f"/{name}") for file in FILES), f"{page.name} names {name}, which does not exist"
    known = set(get_command(cli.app).commands)  # type: ignore[attr-defined]  # the root is a group
    for verb in re.findall(r"(?:^ {4}|`|\$ )inferctl ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert verb in known, f"{page.name} shows `inferctl {verb}`"


def build_site(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site from copies of the configuration and the pages in `folder`."""
    zensical = Path(sys.executable).with_name("zensical")
    return execute(zensical, "build", "--strict", cwd=folder)


def test_the_site_builds_strictly_and_its_pages_load_nothing_from_other_hosts(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    python(tmp_path / "docs" / "write_reference.py", "--commands", code=0)
    assert "\n## inferctl deploy\n" in (tmp_path / "docs" / "reference" / "commands.md").read_text()
    done = build_site(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    built = list((tmp_path / ".cache" / "site").rglob("*.html"))
    assert len(built) >= len(list((ROOT / "docs").rglob("*.md")))
    for file in built:
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^>]*", file.read_text()
        )
        assert loaded == [], file.name
    # The search of the site finds sections that have a word that begins with each word.
    sections = json.loads((tmp_path / ".cache" / "site" / "search.json").read_text())["items"]
    found = [each["location"] for each in sections if all(f" {word}" in each["text"] for word in SEARCHED)]
    assert any(location.startswith("share/metering.html#") for location in found), found
    (tmp_path / "docs" / "index.md").write_text("[dead](no-such-page.md)\n")
    assert build_site(tmp_path).returncode != 0


def test_the_site_has_every_page() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages_of_site = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted(pages_of_site | {"reference/commands.md"})


def test_the_help_of_every_command_has_an_example() -> None:
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]  # the root is a group
        for one in getattr(command, "commands", {name: command}).values():
            said = f"{one.help} {one.epilog}"
            assert "Example" in said and "inferctl" in said.partition("Example")[2], f"{name}: no example in its help"


def test_no_path_of_a_developers_machine_is_in_the_repository() -> None:
    names = execute("git", "ls-files", cwd=ROOT, code=0).stdout.splitlines()
    for name in names:
        text = (ROOT / name).read_bytes()
        for trace in (b"/ro" + b"ot/.pyenv", b"/wo" + b"rk/", b"/opt/" + b"wheels", b"/ho" + b"me/"):
            assert trace not in text, f"{name} carries {trace.decode()}"
