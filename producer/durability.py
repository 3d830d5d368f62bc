"""`durable=True`: a job counts as submitted only once Redis has it on disk, and on a replica where there is one.

Redis acknowledges a write before it is safe: with `appendfsync everysec` a crash of the machine loses up to a second.
"""

from typing import Any

from producer.errors import DurabilityError
from producer.operations import Command, Protocol, send

CONFIRM_MS = 5000
ON_DISK = "WAITAOF"


def confirm_commands(num_replicas: int) -> list[Command]:
    """What follows the writes on the same connection. See `check_confirmed`."""
    wait: list[Command] = [("WAIT", 1, CONFIRM_MS)] if num_replicas else []
    return [*wait, (ON_DISK, 1, 0, CONFIRM_MS)]


def count_replicas() -> Protocol[int]:
    """Raises DurabilityError if this Redis cannot promise anything; nothing was enqueued then."""
    # "COMMAND INFO" in one word: redis-py reads the reply to COMMAND, and cannot where a command is not known
    role, [known], persistence = yield from send(("ROLE",), ("COMMAND INFO", ON_DISK), ("INFO", "persistence"))
    if not known:
        raise DurabilityError("durable=True needs WAITAOF, which Redis has since 7.2; nothing was enqueued")
    if not persistence["aof_enabled"]:
        raise DurabilityError("durable=True needs a Redis with `appendonly yes`; nothing was enqueued")
    return len(role[2]) if isinstance(role[2], list) else 0


def check_confirmed(replies: list[Any]) -> None:
    """`replies`: those to `confirm_commands`."""
    *waited, on_disk = replies
    if waited and not waited[0]:
        raise _unconfirmed("on a replica")
    if not on_disk[0]:
        raise _unconfirmed("on disk")


def _unconfirmed(where: str) -> DurabilityError:
    return DurabilityError(
        f"Redis did not confirm within {CONFIRM_MS / 1000:g} s that what was enqueued is {where}: "
        "submit it again with the same job_id or idempotency_key"
    )
