"""A TCP proxy before a Redis that is far away: whatever is sent arrives later, and as much of it at a time."""

import contextlib
import queue
import socket
import threading
import time

from tests.fakes.tcp_proxy import TcpProxy

Line = queue.SimpleQueue[tuple[float, bytes]]


class DelayingProxy(TcpProxy):
    """A round trip takes `seconds` longer."""

    def __init__(self, upstream_port: int, seconds: float) -> None:
        super().__init__(upstream_port)
        self._one_way_seconds = seconds / 2

    def _join(self, client: socket.socket, server: socket.socket) -> None:
        for source, target in ((client, server), (server, client)):
            line: Line = queue.SimpleQueue()
            threading.Thread(target=self._take, args=(source, line), daemon=True).start()
            threading.Thread(target=self._give, args=(line, target), daemon=True).start()

    def _take(self, source: socket.socket, line: Line) -> None:
        data = b"first"
        while data:
            data = b""  # as after a connection that was cut: nothing follows
            with contextlib.suppress(OSError):
                data = source.recv(1 << 20)
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
