"""`promptmill gateway` as a child process of `serve` and `demo`: whether it can be, its command and its environment."""

import importlib.util
import sys
from pathlib import Path

from producer.settings import ENV_PREFIX

COMMAND = [sys.executable, "-P", "-m", "producer", "gateway"]
DEFAULT_PORT = 8000
DRAIN_SECONDS = 1.0  # its worker goes with it: there is nothing to wait for
REMEDY = "pip install 'promptmill[gateway]'"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("fastapi", "uvicorn", "prometheus_client"))


def environment_for(worker_environment: dict[str, str], fd: int, *, files: Path | None) -> dict[str, str]:
    """The worker's, with the bound socket that the gateway inherits; what else it needs was set by its own variables.
    `files`: the folder of its files where no variable names another, for a Redis that is ours: they are to live as long
    as what it knows."""
    given: dict[str, object] = {"http_fd": fd, "http_drain_seconds": DRAIN_SECONDS}
    if files is not None and f"{ENV_PREFIX}FILES" not in worker_environment:
        given["files"] = files
    return {**worker_environment, **{f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()}}
