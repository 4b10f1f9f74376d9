"""Remove local paths from receipts: people share receipts, and the paths on their machines are private."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferctl.config.spec import HUB_ID

# A path of at least two parts that is not in a URL, and not one of the server's own routes.
_PATH = re.compile(r"(?<![\w.~:/-])(?!/v1/)(?:/[^\s/'\"]+)+/([^\s/'\"]+)/?")
# The same in quotes, where its parts may contain spaces. A space before a slash ends it: then a command is quoted.
_PART = r"(?:(?!\1)[^/\n])*(?!\1)[^/\s]"
_QUOTED = re.compile(rf"(['\"`])(?!/v1/)(?:/{_PART})+/({_PART})/?\1")
_FILE_URL = re.compile(r"\bfile:(?://[^/\s'\"]*)?(?=/)")


def name_of(source: str) -> str:
    """Return a hub id or a plain name as it is, and only the last part of a path."""
    path = Path(source).expanduser()
    if not re.fullmatch(HUB_ID, source) or path.exists():
        return path.name or path.resolve().name or source
    return source


def without_lengths_folder(load: Mapping[str, Any]) -> dict[str, Any]:
    """Return `load` (keys of a plan's load) with only the file name of its lengths, if it has them."""
    found = dict(load)
    if lengths := (load.get("generation") or {}).get("lengths"):
        found["generation"] = {**load["generation"], "lengths": name_of(lengths)}
    return found


def without_folders(value: Any) -> Any:
    """Return `value` (plain data) with only the last part of each absolute path in its strings.

    Receipts quote messages and logs, which contain paths.
    """
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return _PATH.sub(r"\1", _QUOTED.sub(r"\1\2\1", _FILE_URL.sub("", value)))


def without_home(value: Any, home: Path | None = None) -> Any:
    """Return `value` (plain data) with `~` in place of the path of the home folder in its strings."""
    folder = str(home or Path.home()).rstrip("/")
    if not folder:  # the home folder is /
        return value
    if isinstance(value, dict):
        return {key: without_home(inner, home) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_home(item, home) for item in value]
    return re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", "~", value) if isinstance(value, str) else value
