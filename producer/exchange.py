"""One round trip of an asyncio client, without what redis-py's pipeline does beside it, and without a coroutine for
each reply that is at hand. Knows nothing of what is asked.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import ResponseError
from redis.utils import HIREDIS_AVAILABLE

from producer.redis_replies import replies_at_hand

if HIREDIS_AVAILABLE:
    import hiredis


async def exchange(
    pool: redis.asyncio.ConnectionPool, callbacks: Mapping[Any, Any], commands: Sequence[Sequence[Any]]
) -> list[Any]:
    """The replies, in the form that `callbacks` give them. Raises the first error among them, once all are read; and
    what redis-py raises where the connection is lost, refused, or not to be had in time."""
    connection: Any = await pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.send_packed_command(_pack(connection, commands))
        replies = await _read(connection, len(commands))
    except BaseException:  # some of the replies may be on their way still
        await connection.disconnect(nowait=True)
        raise
    finally:
        await asyncio.shield(pool.release(connection))
    for reply in replies:
        if isinstance(reply, ResponseError):
            raise reply
    return [
        callback(reply) if (callback := callbacks.get(command[0])) is not None else reply
        for command, reply in zip(commands, replies, strict=True)
    ]


def _pack(connection: Any, commands: Sequence[Sequence[Any]]) -> list[bytes]:
    """As redis-py's blocking client does; its asyncio client has Python alone for it."""
    if not HIREDIS_AVAILABLE:
        return connection.pack_commands(commands)  # type: ignore[no-any-return]
    return [hiredis.pack_command((*name.encode().split(), *arguments)) for name, *arguments in commands]


async def _read(connection: Any, num_replies: int) -> list[Any]:
    replies: list[Any] = []
    while len(replies) < num_replies:
        try:
            replies.append(await connection.read_response())
            for reply in replies_at_hand(connection):
                replies.append(reply)
        except ResponseError as error:
            replies.append(error)
    return replies
