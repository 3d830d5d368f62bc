"""The oldest Redis that will do. Asks nobody: who starts on a server has asked it what it is."""

from collections.abc import Mapping
from typing import Any

MIN_SERVER_VERSION = (6, 2)  # LPOP with a count, by which workers claim


def is_too_old(server: Mapping[str, Any]) -> str | None:
    """What is wrong with the server whose section `server` of INFO this is; None: nothing. Valkey and other forks tell
    as `redis_version` the version of Redis whose commands they have."""
    version = str(server["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) >= MIN_SERVER_VERSION:
        return None
    return (
        f"Redis {version} is too old: promptmill needs {'.'.join(map(str, MIN_SERVER_VERSION))} or newer, or a Valkey"
    )
