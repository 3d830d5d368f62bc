"""A TCP proxy before Redis that cuts connections: in place of a reply, or at any byte of either direction."""

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import Self


class CuttingProxy:
    """Cuts a connection instead of passing a reply on, with `probability`; none while it is 0.

    With `anywhere` it cuts in the middle of what is sent as well: requests that Redis gets half of, or half of whose
    commands it carries out, and replies that end early.
    """

    def __init__(self, upstream_port: int, *, seed: int, anywhere: bool = False) -> None:
        self._upstream_port = upstream_port
        self._anywhere = anywhere
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.probability = 0.0
        self.num_cuts = 0
        self._is_partitioned = False
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
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

    def cut_all(self) -> None:
        """Cut every connection there is, wherever it stands."""
        with self._lock:
            for client in self._open:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def lead_to(self, upstream_port: int) -> None:
        """Whoever connects from now on gets there; the connections that are stay where they are."""
        self._upstream_port = upstream_port

    @contextlib.contextmanager
    def partition(self) -> Iterator[None]:
        """Nobody gets through, in either direction."""
        self._is_partitioned = True
        self.cut_all()
        try:
            yield
        finally:
            self._is_partitioned = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_partitioned:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream_port))
            except OSError:  # Redis is away: so are we
                client.close()
                continue
            with self._lock:
                self._open = [end for end in self._open if end.fileno() >= 0] + [client]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        try:
            while data := source.recv(65536):
                if (is_reply or self._anywhere) and self._random.random() < self.probability:
                    self.num_cuts += 1
                    if self._anywhere:
                        target.sendall(data[: self._random.randrange(len(data))])
                    break
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            if is_reply:
                source.close()
                target.close()
