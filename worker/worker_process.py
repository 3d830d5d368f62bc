"""`promptmill worker` as a child process of `serve` and `demo`: its command and its environment."""

import os
import sys

from producer.settings import ENV_PREFIX
from worker.settings import WorkerSettings

COMMAND = [sys.executable, "-P", "-m", "producer", "worker"]


def environment_for(settings: WorkerSettings, redis_url: str) -> dict[str, str]:
    """What was set, however it was set, as variables; for a worker on `redis_url` and for its clients."""
    given = settings.model_dump(mode="json", include=settings.model_fields_set) | {"redis_url": redis_url}
    return {**os.environ, **{f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in given.items()}}
