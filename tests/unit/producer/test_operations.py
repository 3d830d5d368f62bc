"""Protocols without a connection: when they try again, and when they give up."""

import ssl
import sys
from typing import Any

import pytest
import redis

from producer import RedisRefusedError, RedisUnavailableError
from producer.operations import (
    RECONNECT_MAX_DELAY_SECONDS,
    ConnectionLost,
    NoConnection,
    Protocol,
    Reconnect,
    Send,
    Sleep,
    send,
)
from producer.redis_connection import translate
from producer.redis_replies import AsyncReplyParser, NotServingError, ReplyParser
from producer.stored_results import read_object


def drive(protocol: Protocol[Any], replies: list[Any]) -> tuple[Any, list[Any]]:
    """Answer each Send with the next reply (an exception is thrown); returns the outcome and the operations seen."""
    seen: list[Any] = []
    answer: Any = None
    try:
        while True:
            operation = protocol.throw(answer) if isinstance(answer, Exception) else protocol.send(answer)
            seen.append(operation)
            answer = replies.pop(0) if isinstance(operation, Send) else None
    except StopIteration as end:
        return end.value, seen


def test_a_lost_reply_is_answered_by_sending_again() -> None:
    value, seen = drive(send(("PING",)), [ConnectionLost("gone"), ConnectionLost("gone"), ["PONG"]])
    assert value == ["PONG"]
    assert [type(operation) for operation in seen] == [Send, Sleep, Send, Sleep, Send]


def test_sending_gives_up_in_the_end() -> None:
    with pytest.raises(RedisUnavailableError, match="gone"):
        drive(send(("PING",)), [ConnectionLost("gone")] * 6)


def test_other_errors_are_not_tried_again() -> None:
    with pytest.raises(RedisUnavailableError, match="wrong password"):
        drive(send(("PING",)), [RedisUnavailableError("wrong password"), ["PONG"]])


def test_a_waiting_client_is_more_patient_once_it_was_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def outlast() -> tuple[float, float]:
        """Seconds slept until the end of patience, and the longest sleep."""
        nonlocal now
        delays: list[float] = []
        while True:
            try:
                for operation in reconnect.wait(ConnectionLost("gone")):
                    assert isinstance(operation, Sleep)
                    delays.append(operation.seconds)
                    now += operation.seconds
            except ConnectionLost:
                return sum(delays), max(delays)

    reconnect = Reconnect()
    assert outlast()[0] < 5
    reconnect.succeed()
    total, longest = outlast()
    assert 60 <= total < 65
    assert longest == RECONNECT_MAX_DELAY_SECONDS


def _caused_by(cause: Exception) -> redis.ConnectionError:
    error = redis.ConnectionError("as redis-py wraps it")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (redis.ConnectionError("refused"), ConnectionLost, "cannot be reached"),
        (redis.TimeoutError("late"), ConnectionLost, "cannot be reached"),
        (redis.TimeoutError("Timeout connecting to server"), NoConnection, "cannot be reached"),
        (redis.BusyLoadingError("loading"), ConnectionLost, "cannot be reached"),
        (NotServingError("You can't write against a read only replica"), ConnectionLost, "does not serve now"),
        (redis.AuthenticationError("no"), RedisRefusedError, "check user and password"),
        (redis.exceptions.NoPermissionError("no"), RedisRefusedError, "rights that deploy/README.md lists"),
        (
            redis.exceptions.ClusterCrossSlotError("slots"),
            RedisRefusedError,
            "part of a cluster: promptmill needs a Redis that is",
        ),
        (redis.exceptions.MovedError("1 host:2"), RedisRefusedError, "part of a cluster"),
        (redis.exceptions.InvalidResponse("odd"), RedisRefusedError, "does not speak as Redis does"),
        (_caused_by(ssl.SSLError("wrong version number")), RedisRefusedError, "write redis://"),
        (_caused_by(ssl.SSLCertVerificationError("unknown")), RedisRefusedError, "?ssl_ca_certs=FILE"),
        (_caused_by(ssl.SSLEOFError("cut")), ConnectionLost, "cannot be reached"),
        (redis.OutOfMemoryError("full"), RedisUnavailableError, "raise maxmemory"),
        (redis.ResponseError("odd"), RedisUnavailableError, "answers with an error: odd"),
    ],
)
def test_redis_errors_are_said_with_their_remedy(error: Exception, kind: type[Exception], words: str) -> None:
    said = translate(error, "redis://host")
    assert type(said) is kind
    assert words in str(said)


@pytest.mark.parametrize("parser", [ReplyParser, AsyncReplyParser])
@pytest.mark.parametrize(
    ("reply", "expected", "said"),
    [
        ("READONLY You can't write.", NotServingError, "You can't write."),
        (
            "MISCONF Errors. script: abc, on @user_script:12.",
            NotServingError,
            "Errors. script: abc, on @user_script:12.",
        ),
        (
            "ERR Error running script (call to f_0): @user_script:9: @user_script: 9: -READONLY You can't write.",
            NotServingError,
            "You can't write.",
        ),
        ("@user_script: 9: -OOM command not allowed.", redis.OutOfMemoryError, "command not allowed."),
        (
            "EXECABORT Transaction discarded because of: MISCONF Errors writing to the AOF file: No space left.",
            NotServingError,
            "Errors writing to the AOF file: No space left.",
        ),
        (
            "EXECABORT Transaction discarded because of previous errors.",
            redis.exceptions.ExecAbortError,
            "Transaction discarded because of previous errors.",
        ),
        ("ERR Error running script (call to f_0): @user_script:9: no number", redis.ResponseError, "no number"),
    ],
)
def test_what_redis_says_when_it_does_not_serve_is_told_apart_also_within_a_script_or_transaction(
    parser: Any, reply: str, expected: type[Exception], said: str
) -> None:
    error = parser.parse_error(reply)
    assert type(error) is expected and str(error).endswith(said)


def test_a_result_in_s3_without_boto3_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "producer.s3_connection", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(Exception, match=r"pip install 'promptmill\[s3\]'"):
        read_object("s3://bucket/key", None)
