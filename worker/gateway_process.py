"""`promptmill gateway` as a child process of `serve` and `demo`: whether it can be, its command and its environment."""

import importlib.util
import sys

from producer.settings import ENV_PREFIX

COMMAND = [sys.executable, "-m", "producer.cli", "gateway"]
DEFAULT_PORT = 8000
DRAIN_SECONDS = 1.0  # its worker goes with it: there is nothing to wait for
REMEDY = "pip install promptmill[gateway]"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("fastapi", "uvicorn", "prometheus_client"))


def environment_for(worker_environment: dict[str, str], port: int) -> dict[str, str]:
    """The worker's, with the gateway's port; what else it needs was set by its own variables."""
    given = {"http_port": port, "http_drain_seconds": DRAIN_SECONDS}
    return {**worker_environment, **{f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()}}
