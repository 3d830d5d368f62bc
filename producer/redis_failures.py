"""What redis-py's errors say of a Redis and its URL, for clients and workers alike: what is wrong, and the remedy.

Knows nothing of what was being done: who may try again decides that.
"""

import re
import ssl

import redis
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
    ClusterError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
)
from redis.sentinel import MasterNotFoundError

from producer.redis_replies import NotServingError
from producer.settings import redact_url

# A job, its place on a queue, its lease and its stream change in one step, which a cluster does for one slot alone.
_NO_CLUSTER = (
    "promptmill needs a Redis that is not a cluster, alone or behind Sentinels (redis+sentinel://HOST,HOST/SERVICE)"
)
_QUOTED_COMMAND = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)
_IN_TUPLE = re.compile(r"""\((["'])(.*)\1,\)""", re.DOTALL)  # as asyncio's pipelines have it
_LOST = (redis.ConnectionError, redis.TimeoutError, OSError)
_LOGIN = (AuthenticationError, AuthorizationError)
_CLUSTER = (ClusterCrossSlotError, ClusterError, AskError)


def is_refusal(error: Exception) -> bool:
    """Whether waiting does not help: the login, the rights, TLS or what is spoken do not fit, or it is a cluster."""
    refused = (*_LOGIN, *_CLUSTER, NoPermissionError, InvalidResponse)
    return isinstance(error, refused) or _tls_fault(error) is not None


def is_lost(error: Exception) -> bool:
    """Whether Redis cannot be reached, so that trying again may help."""
    return isinstance(error, _LOST) and not is_refusal(error)


def has_no_connection(error: Exception) -> bool:
    """Whether nobody answered while a connection was being made, TLS included."""
    return isinstance(error, MasterNotFoundError) or (
        isinstance(error, redis.TimeoutError) and "connecting" in str(error)
    )


def explain(error: Exception, url: str) -> str:
    """One line, without the URL's password."""
    where, cause = redact_url(url), _cause(error)
    if isinstance(error, MasterNotFoundError):  # redis-py's words are its connections' whole settings
        cause = "no Sentinel answers with a master of that service"
    fault = _tls_fault(error)
    if isinstance(error, _LOGIN):
        return f"Redis at {where} refuses us: {cause}; check user and password in --redis-url"
    if isinstance(error, NoPermissionError):
        return f"Redis at {where} refuses us: {cause}; give its user the rights that deploy/README.md lists"
    if isinstance(error, _CLUSTER):
        return f"Redis at {where} is part of a cluster: {_NO_CLUSTER}"
    if isinstance(error, OutOfMemoryError):
        return f"Redis at {where} is full: {cause}; raise maxmemory or drain the queues"
    if isinstance(error, NotServingError):
        return f"Redis at {where} does not serve now: {cause}; see to the server"
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"Redis at {where} cannot be trusted: {cause}; name its authority with ?ssl_ca_certs=FILE in --redis-url"
    if fault is not None:
        return f"no TLS with Redis at {where}: {cause}; write redis:// in --redis-url if that port speaks no TLS"
    if isinstance(error, InvalidResponse):
        return (
            f"what answers at {where} does not speak as Redis does: {cause}; check --redis-url, rediss:// is with TLS"
        )
    if isinstance(error, _LOST):
        return (
            f"Redis at {where} cannot be reached: {cause}; start it, or name another one with --redis-url or "
            f"PROMPTMILL_REDIS_URL{_tls_hint(error, url)}"
        )
    return f"Redis at {where} answers with an error: {cause}"


def _cause(error: Exception) -> str:
    """What Redis said, without the command, whose beginning redis-py quotes: that may hold a prompt or a secret."""
    said = _QUOTED_COMMAND.sub("", str(error))
    if said != str(error) and (in_tuple := _IN_TUPLE.fullmatch(said)) is not None:
        said = in_tuple[2]
    return said.rstrip(".")


def _tls_fault(error: BaseException | None) -> ssl.SSLError | None:
    """What redis-py wraps; none for a connection that was merely cut, or an answer that did not come."""
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _tls_hint(error: Exception, url: str) -> str:
    """The two that misunderstand each other most often hang, or hang up."""
    if url.startswith("rediss+"):
        return "; name its authority with ?ssl_ca_certs=FILE, or write redis+sentinel:// if nobody there speaks TLS"
    if url.startswith("rediss"):
        return "; write redis:// if that port speaks no TLS"
    is_cut = "closed" in str(error) or isinstance(error.__context__, ConnectionResetError)
    return "; write rediss:// if that port speaks TLS" if is_cut else ""
