"""`promptmill worker` as a child process of `serve` and `demo`: its command, its environment, and its end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from producer.settings import ENV_PREFIX
from worker.held_signals import held_signals
from worker.settings import WorkerSettings

COMMAND = [sys.executable, "-m", "producer.cli", "worker"]
STOP_SECONDS = 5.0  # a worker that is told to end is gone sooner


def environment_for(settings: WorkerSettings, redis_url: str) -> dict[str, str]:
    """What was set, however it was set, as variables; for a worker on `redis_url` and for its clients."""
    given = settings.model_dump(mode="json", include=settings.model_fields_set) | {"redis_url": redis_url}
    return {**os.environ, **{f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()}}


@contextmanager
def running(command: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block, whenever a signal comes. `options`: those of `Popen`."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with held_signals():
            process = subprocess.Popen(command, **options)
        yield process
    finally:
        if process is not None:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
