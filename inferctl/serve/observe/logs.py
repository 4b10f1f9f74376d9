"""Logging for both processes, as text or as JSON with one object per line."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from inferctl.tenancy.metering.usage_event import UsageEvent


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: `time`, `level`, `logger`, `message`, `fields` of the record, optional `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
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


def configure(style: str) -> None:
    """Log warnings and errors to stderr, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    if style == "json":
        for name in ("inferctl.server", "inferctl.request"):
            logging.getLogger(name).setLevel(logging.INFO)


def log_request(event: UsageEvent) -> None:
    """Log a finished request."""
    fields = {
        "request_id": event.request_id,
        "endpoint": event.endpoint,
        "model": event.model,
        "status": event.status,
        "code": event.code,
        "ms": round(1000 * event.seconds, 3),
        "inputs": event.inputs,
        "tokens": event.input_tokens,
        "output_tokens": event.output_tokens,
        "key_id": event.key_id,
        "bulk": event.priority == "bulk",
        **{f"{name}_ms": round(1000 * seconds, 3) for name, seconds in event.phases.items()},
    }
    logging.getLogger("inferctl.request").info("request", extra={"fields": fields})
