"""Log lines as JSON, one object a line, for both processes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger`, `message`, `exception` if there is one, and what the record's `fields` add."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(style: str, level: int = logging.WARNING) -> None:
    """Log to stderr, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def speaker(style: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """What says lines for people: `say`, or a log line of level info where all lines are JSON."""
    if style != "json":
        return say
    log = logging.getLogger("inferctl.server")
    log.setLevel(logging.INFO)
    logging.getLogger("inferctl.request").setLevel(logging.INFO)
    return log.info
