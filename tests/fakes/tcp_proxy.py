"""What TCP proxies before a Redis have in common: a port of their own, and a connection upstream for each client."""

import socket
import threading
from abc import ABC, abstractmethod
from typing import Self


class TcpProxy(ABC):
    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._join(client, socket.create_connection(("127.0.0.1", self._upstream_port)))

    @abstractmethod
    def _join(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what they send, on other threads."""
