"""What a receipt must not tell: receipts are handed around, and where somebody keeps their files is nobody's business."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from inferctl.spec import HUB_ID


def name_of(source: str) -> str:
    """A hub id or a plain name as it is; of a path only its last part."""
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(HUB_ID, source):
        return path.name or path.resolve().name or source
    return source


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
