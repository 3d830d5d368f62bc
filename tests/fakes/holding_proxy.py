"""A TCP proxy before Redis that passes everything on, until a client sends what it is told to hold back."""

import contextlib
import socket
import threading

from tests.fakes.tcp_proxy import TcpProxy


class HoldingProxy(TcpProxy):
    """What holds `marker` is swallowed: whoever sent it waits for a reply that never comes."""

    def __init__(self, upstream_port: int, marker: bytes) -> None:
        super().__init__(upstream_port)
        self._marker = marker
        self.has_held = threading.Event()

    def _join(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
        threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if is_request and self._marker in data:
                    self.has_held.set()
                    continue
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if not is_request:
            source.close()
            target.close()
