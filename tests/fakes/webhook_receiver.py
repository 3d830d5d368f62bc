"""A real HTTP server that webhooks are sent to: it keeps what it gets, and answers as a test says."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

from tests.fakes.waiting import WAIT_SECONDS


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: str


@dataclass(frozen=True)
class Reply:
    status: int = 204
    headers: tuple[tuple[str, str], ...] = ()
    holds: threading.Event | None = None  # answers once it is set


class WebhookReceiver:
    """`answer` is asked with the number of the request, from 1. With `tls`, it speaks HTTPS."""

    def __init__(self, answer: Callable[[int], Reply], tls: ssl.SSLContext | None = None) -> None:
        self.received: Queue[Received] = Queue()
        self.num_received = 0
        self._answer = answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # who asked has gone
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def next(self, timeout: float = WAIT_SECONDS) -> Received:
        return self.received.get(timeout=timeout)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.num_received += 1
                reply = receiver._answer(receiver.num_received)
                receiver.received.put(Received(self.path, headers, self.rfile.read(length).decode()))
                if reply.holds is not None:
                    reply.holds.wait(30)
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers:
                        self.send_header(name, value)
                    self.end_headers()
                except OSError:
                    pass  # whoever asked has gone

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler


@contextmanager
def receiving(
    answer: Callable[[int], Reply] = lambda number: Reply(), tls: ssl.SSLContext | None = None
) -> Iterator[WebhookReceiver]:
    receiver = WebhookReceiver(answer, tls)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
