"""One request of a webhook to its receiver. Knows nothing of retries and of Redis."""

import io
import socket
import time
from collections.abc import Callable
from email.message import Message
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from producer.deliveries import Answer, read_retry_after
from producer.job_webhooks import MAX_ATTEMPT_SECONDS, JobWebhook

MAX_PROBLEM_CHARS = 500


def send_webhook(webhook: JobWebhook, *, message_id: str) -> Answer:
    """Blocks for as long as the webhook says, at most, and for what the system takes to find the host's addresses. No
    redirect is followed: it could lead to what is not allowed.

    `message_id` goes into the header `webhook-id`: a receiver tells repetitions by it.
    """
    body = webhook.body.encode() if webhook.body is not None else None
    try:
        request = Request(webhook.url, data=body, headers=webhook.headers, method=webhook.method)
        request.add_header("webhook-id", message_id)
        with _opener.open(request, timeout=min(webhook.timeout_seconds, MAX_ATTEMPT_SECONDS)) as response:
            return Answer(response.status)
    except HTTPError as error:
        with error:
            return Answer(error.code, f"answered {error.code}", read_retry_after(error.headers.get("retry-after")))
    except Exception as error:  # of any type: no answer, none of HTTP, or nothing that can be asked at all
        return Answer(None, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        return None


class _TimedConnection(HTTPConnection):
    """Its timeout is for all that it does together; http.client's own is for each address and each read anew."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends_at = time.monotonic() + (self.timeout or 0.0)
        self._create_connection = self._connect_socket
        self.response_class: Any = partial(_TimedResponse, self._seconds_left)

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self._seconds_left())
        super().send(data)

    def _seconds_left(self) -> float:
        """Raises TimeoutError."""
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no response within {self.timeout:g} s")
        return left

    def _connect_socket(self, address: tuple[str, int], *_: Any) -> socket.socket:
        *others, last = socket.getaddrinfo(*address, 0, socket.SOCK_STREAM)
        for found in others:
            try:
                return self._connect_to(found)
            except OSError:
                self._seconds_left()
        return self._connect_to(last)

    def _connect_to(self, found: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = found
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(self._seconds_left())
            connected.connect(address)
        except BaseException:
            connected.close()
            raise
        return connected


class _TimedSecureConnection(_TimedConnection, HTTPSConnection):
    pass


class _TimedResponse(HTTPResponse):
    def __init__(self, seconds_left: Callable[[], float], sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedReader(sock, seconds_left))


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, seconds_left: Callable[[], float]) -> None:
        self._socket = sock
        self._seconds_left = seconds_left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._seconds_left())
        return self._socket.recv_into(buffer)


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_TimedConnection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_TimedSecureConnection, req)


_opener: Any = build_opener(_NoRedirects, _Http, _Https)
