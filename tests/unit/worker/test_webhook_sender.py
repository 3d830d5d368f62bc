"""A webhook's timeout is for the whole attempt, whatever its receiver does meanwhile."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme
from httpx2 import create_ssl_context

from producer.job_webhooks import JobWebhook
from tests.fakes.webhook_receiver import receiving
from worker import webhook_sender
from worker.webhook_sender import send_webhook

TIMEOUT_SECONDS = 1.0


def webhook(url: str) -> JobWebhook:
    return JobWebhook(
        job_id="x",
        url=url,
        method="POST",
        headers={},
        timeout_seconds=TIMEOUT_SECONDS,
        body="{}",
        allowed=url,
        written_at=0.0,
    )


@contextmanager
def answering(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The URL of a receiver of one request, which is answered until the event is set."""
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                with suppress(OSError):  # who asked has gone
                    answer(connection, is_over)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        is_over.set()
        thread.join(10)


def resolve_to(monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[str, int]]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def trickle(connection: socket.socket, is_over: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
    while not is_over.wait(0.05):
        connection.sendall(b"x")


def say_nothing(connection: socket.socket, is_over: threading.Event) -> None:
    is_over.wait()


@pytest.mark.parametrize("answer", [trickle, say_nothing])
def test_a_receiver_that_does_not_end_its_answer_is_given_up_in_time(
    answer: Callable[[socket.socket, threading.Event], None],
) -> None:
    with answering(answer) as url:
        got = send_webhook(webhook(url), message_id="m")
    assert got.status is None and "time" in got.problem.lower()


def test_a_host_whose_addresses_do_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())
        resolve_to(monkeypatch, [full.getsockname()] * 1000)
        begin = time.monotonic()
        url = f"http://many.example:{full.getsockname()[1]}/"
        assert send_webhook(webhook(url), message_id="m").problem.startswith("TimeoutError")
        assert time.monotonic() - begin < 100 * TIMEOUT_SECONDS


def test_the_first_address_that_takes_the_connection_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(connection: socket.socket, is_over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with answering(accept) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        resolve_to(monkeypatch, [("127.0.0.2", port), ("127.0.0.1", port)])  # nobody listens at the first
        assert send_webhook(webhook(f"http://two.example:{port}/"), message_id="m").is_delivered


@pytest.mark.parametrize(("host", "is_delivered"), [("localhost", True), ("other.example", False)])
def test_a_certificate_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, is_delivered: bool
) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert(host).configure_cert(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(webhook_sender, "_ssl_context", create_ssl_context)  # which reads it anew
    with receiving(tls=context) as receiver:
        url = f"https://localhost:{receiver.port}/"
        assert send_webhook(webhook(url), message_id="m").is_delivered == is_delivered
