"""TCP proxies before a server: one that passes everything on, one whose server is far away, one that holds back."""

import contextlib
import queue
import socket
import threading
import time
from typing import Self

_PIECE_BYTES = 1 << 16


class TcpProxy:
    """A port of its own, and a connection upstream for each client, whose bytes go both ways as they come."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def lead_to(self, upstream_port: int) -> None:
        """Whoever connects from now on gets there; the connections that are stay where they are."""
        self._upstream_port = upstream_port

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._lets_in(client):
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream_port))
            except OSError:  # nobody is there: nor are we
                client.close()
                continue
            for source, target, is_reply in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(source, target, is_reply), daemon=True).start()

    def _lets_in(self, client: socket.socket) -> bool:
        return True

    def _pump(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(_PIECE_BYTES)) and self._pass_on(data, target, is_reply):
                pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if is_reply:
            source.close()
            target.close()

    def _pass_on(self, data: bytes, target: socket.socket, is_reply: bool) -> bool:
        """Whether the connection goes on."""
        target.sendall(data)
        return True


class HoldingProxy(TcpProxy):
    """A request with `marker` in it is swallowed: whoever sent it waits for a reply that never comes."""

    def __init__(self, upstream_port: int, marker: bytes) -> None:
        super().__init__(upstream_port)
        self._marker = marker
        self.has_held = threading.Event()

    def _pass_on(self, data: bytes, target: socket.socket, is_reply: bool) -> bool:
        if is_reply or self._marker not in data:
            return super()._pass_on(data, target, is_reply)
        self.has_held.set()
        return True


Line = queue.SimpleQueue[tuple[float, bytes]]


class DelayingProxy(TcpProxy):
    """A round trip takes `seconds` longer: whatever is sent arrives later, and as much of it at a time."""

    def __init__(self, upstream_port: int, seconds: float) -> None:
        super().__init__(upstream_port)
        self._one_way_seconds = seconds / 2

    def _pump(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        line: Line = queue.SimpleQueue()
        threading.Thread(target=self._give, args=(line, target), daemon=True).start()
        data = b"first"
        while data:
            data = b""  # as after a connection that was cut: nothing follows
            with contextlib.suppress(OSError):
                data = source.recv(_PIECE_BYTES)
            line.put((time.monotonic() + self._one_way_seconds, data))

    def _give(self, line: Line, target: socket.socket) -> None:
        with target, contextlib.suppress(OSError):
            while True:
                at, data = line.get()
                time.sleep(max(0.0, at - time.monotonic()))
                if not data:
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
