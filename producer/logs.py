"""How long-running processes log: the standard library's logging, one line an event, ours with `action=…` and further
`name=value`. A value with spaces in it is quoted, or the last one.

Jobs' prompts and answers are never logged.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

_ACTION = "action="
_QUIET_LOGGERS = ("boto3", "botocore", "rq", "s3transfer", "urllib3", "uvicorn")  # they log every step at info


def configure_logging(level: str, layout: Literal["text", "json"]) -> None:
    """Send everything at `level` and above to stderr. Called once, by the process's entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if layout == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname.lower()} {record.name} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """One object a line; `action` is a member of its own, for filters."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        event: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        if message.startswith(_ACTION):
            event["action"], _, message = message.removeprefix(_ACTION).partition(" ")
        event["message"] = message
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
