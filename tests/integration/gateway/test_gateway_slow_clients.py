"""Clients that send half a request, or a head without an end: they are told why, and hold nothing for long."""

import json
import socket

import pytest

from producer.gateway import http_protocol, request_body
from tests.fakes.gateways import RunningGateway

LINE = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
HEAD = LINE + b"content-type: application/json\r\ncontent-length: 100\r\n\r\n"
WHOLE = b"GET /v1/files HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(request_body, "LINGER_SECONDS", 0.3)


@pytest.fixture
def short_time_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)


def talk(gateway: RunningGateway, data: bytes) -> bytes:
    """All that comes back until the gateway closes the connection, which is never closed from here."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.rpartition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.usefixtures("short_time_for_heads")
def test_half_a_head_is_waited_for_so_long_and_no_longer(gateway: RunningGateway) -> None:
    status, message = error_of(talk(gateway, LINE + b"x-half: "))
    assert status == 408 and "headers did not come within 0.3 s" in message


@pytest.mark.usefixtures("short_time_for_heads")
def test_a_connection_that_says_nothing_is_closed(gateway: RunningGateway) -> None:
    assert talk(gateway, b"") == b""


def test_the_next_request_of_a_connection_is_held_to_the_same_time(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 3.0)  # a busy machine may be slow to read even a whole one
    answer = talk(gateway, WHOLE + LINE)
    assert answer.startswith(b"HTTP/1.1 200")
    assert error_of(answer[answer.index(b"HTTP/1.1 408") :])[0] == 408


@pytest.mark.parametrize("start", [LINE + b"x-long: ", b"GET /"])
def test_a_head_without_an_end_is_refused_at_its_limit(gateway: RunningGateway, start: bytes) -> None:
    status, message = error_of(talk(gateway, start + b"a" * 66_000))
    assert status == 431 and "larger than 65536 bytes" in message


def test_half_a_body_is_waited_for_so_long_and_no_longer(gateway: RunningGateway) -> None:
    status, message = error_of(talk(gateway, HEAD + b'{"model": '))
    assert status == 408 and "the body was silent for 0.3 s" in message


def test_half_an_upload_leaves_nothing_behind(gateway: RunningGateway) -> None:
    form = b'--X\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    upload = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=X\r\n"
    status, _ = error_of(talk(gateway, upload + b"content-length: 9000\r\n\r\n" + form))
    assert status == 408
    listed = talk(gateway, b"GET /v1/files HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b'"data":[]' in listed
