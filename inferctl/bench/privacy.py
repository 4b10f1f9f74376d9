"""What a receipt must not tell: receipts are handed around, and where somebody keeps their files is nobody's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferctl.spec import HUB_ID

# A path of at least two parts, where none of a URL begins; the server's own routes are no files.
_PATH = re.compile(r"(?<![\w.~:/-])(?!/v1/)(?:/[^\s/'\"]+)+/([^\s/'\"]+)/?")
# The same in quotes, where its parts may have spaces; one before a slash ends it: what is quoted is a command then.
_PART = r"(?:(?!\1)[^/\n])*(?!\1)[^/\s]"
_QUOTED = re.compile(rf"(['\"`])(?!/v1/)(?:/{_PART})+/({_PART})/?\1")
_FILE_URL = re.compile(r"\bfile:(?://[^/\s'\"]*)?(?=/)")


def name_of(source: str) -> str:
    """A hub id or a plain name as it is; of a path only its last part."""
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(HUB_ID, source):
        return path.name or path.resolve().name or source
    return source


def traceless(load: Mapping[str, Any]) -> dict[str, Any]:
    """`load` (keys of a plan's load) whose trace, if it has one, is only named."""
    return {**load, "trace": name_of(load["trace"])} if load.get("trace") else dict(load)


def without_folders(value: Any) -> Any:
    """`value` (plain data) with only the last part of the absolute paths in its texts: messages and logs are quoted in receipts."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    return _PATH.sub(r"\1", _QUOTED.sub(r"\1\2\1", _FILE_URL.sub("", value)))


def without_home(value: Any, home: Path | None = None) -> Any:
    """`value` (plain data) with `~` wherever a text names something below the home folder."""
    place = str(home or Path.home()).rstrip("/")
    if not place:  # a user whose home is /
        return value
    if isinstance(value, dict):
        return {key: without_home(one, home) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_home(one, home) for one in value]
    return re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w.-])", "~", value) if isinstance(value, str) else value
