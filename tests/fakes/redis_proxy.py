"""A TCP proxy before Redis that cuts connections: in place of a reply, or at any byte of either direction."""

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

from tests.fakes.tcp_proxy import TcpProxy


class CuttingProxy(TcpProxy):
    """Cuts a connection instead of passing a reply on, with `probability`; none while it is 0.

    With `anywhere` it cuts in the middle of what is sent as well: requests that Redis gets half of, or half of whose
    commands it carries out, and replies that end early.
    """

    def __init__(self, upstream_port: int, *, seed: int, anywhere: bool = False) -> None:
        super().__init__(upstream_port)
        self._anywhere = anywhere
        self._random = random.Random(seed)
        self.probability = 0.0
        self.num_cuts = 0
        self._is_partitioned = False
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()

    def cut_all(self) -> None:
        """Cut every connection there is, wherever it stands."""
        with self._lock:
            for client in self._open:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def partition(self) -> Iterator[None]:
        """Nobody gets through, in either direction."""
        self._is_partitioned = True
        self.cut_all()
        try:
            yield
        finally:
            self._is_partitioned = False

    def _lets_in(self, client: socket.socket) -> bool:
        with self._lock:
            self._open = [end for end in self._open if end.fileno() >= 0] + [client]
        return not self._is_partitioned

    def _pass_on(self, data: bytes, target: socket.socket, is_reply: bool) -> bool:
        if (is_reply or self._anywhere) and self._random.random() < self.probability:
            self.num_cuts += 1
            if self._anywhere:
                target.sendall(data[: self._random.randrange(len(data))])
            return False
        return super()._pass_on(data, target, is_reply)
