"""Replies by which a Redis says that it does not serve now, and may later; redis-py has no words for them.

They are raised as lost connections are, and the connection that got one is dropped: where a master has become a
replica, the same URL may lead to another one by now. Nothing was written by a command that got one.
"""

import re
from collections.abc import Iterator
from typing import Any

import redis
from redis._parsers import _AsyncHiredisParser, _AsyncRESP2Parser, _HiredisParser, _RESP2Parser
from redis._parsers.base import BaseParser
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.utils import HIREDIS_AVAILABLE


class NotServingError(redis.ConnectionError):
    """The same command may be taken later, or elsewhere."""


_CODES = (
    "BUSY",  # somebody's script runs on and on
    "MASTERDOWN",  # a replica that has lost its master
    "MISCONF",  # its disk cannot be written
    "NOREPLICAS",  # fewer replicas than min-replicas-to-write
    "READONLY",  # a replica, by now
)
_CLASSES = {**BaseParser.EXCEPTION_CLASSES, **dict.fromkeys(_CODES, NotServingError)}
_INNER = re.compile(
    r"(?:ERR Error running script|@user_script).*: -([A-Z]+ .*)"  # before Redis 7
    r"|EXECABORT Transaction discarded because of: ([A-Z]+ .*)"
)


class _Refusals:
    EXCEPTION_CLASSES = _CLASSES

    @classmethod
    def parse_error(cls, response: str) -> Any:
        """Of a script's reply, what was said to its command; of a transaction's, why it was not carried out."""
        found = _INNER.fullmatch(response)
        return super().parse_error(found[1] or found[2] if found else response)  # type: ignore[misc]


class ReplyParser(_Refusals, _HiredisParser if HIREDIS_AVAILABLE else _RESP2Parser):  # type: ignore[misc]
    """redis-py's option `parser_class`, for blocking clients."""


class AsyncReplyParser(_Refusals, _AsyncHiredisParser if HIREDIS_AVAILABLE else _AsyncRESP2Parser):  # type: ignore[misc]
    """The same, for asyncio's."""


def replies_at_hand(connection: Any) -> Iterator[Any]:
    """What an asyncio connection has read already and nobody has asked for: a few coroutines less for each reply.
    Without hiredis there is nothing. Raises what the server says against the connection."""
    reader: Any = connection._parser._reader if isinstance(connection._parser, _AsyncHiredisParser) else None
    while reader is not None and (reply := reader.gets()) is not NOT_ENOUGH_DATA:
        if isinstance(reply, redis.RedisError):
            raise reply
        yield reply
