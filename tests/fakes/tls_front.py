"""What a Redis with TLS looks like from outside: TLS on a port of its own, before a server that speaks none."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme

TLS_HANDSHAKE = b"\x16"  # the first byte of whoever speaks TLS


@contextmanager
def tls_front(
    upstream_port: int,
    *,
    ca_file: Path | None = None,
    authority: trustme.CA | None = None,
    takes_plain: bool = False,
) -> Iterator[int]:
    """The port. Its certificate is from nobody whom anybody trusts, but who is told to by `ca_file`, or trusts the
    `authority`. With `takes_plain`, who speaks no TLS is let through as well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = authority or trustme.CA()
    if ca_file is not None:
        authority.cert_pem.write_to_path(str(ca_file))
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        front = _Front(listener, upstream_port, context, takes_plain)
        thread = threading.Thread(target=front.run, name="tls-front")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            front.stop()
            thread.join(20)


class _Front:
    """Carries what comes to the listener to the upstream's port and back."""

    def __init__(self, listener: socket.socket, upstream_port: int, context: ssl.SSLContext, takes_plain: bool) -> None:
        self._listener = listener
        self._upstream_port = upstream_port
        self._context = context
        self._takes_plain = takes_plain
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def stop(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._stop.wait()
        accepting.cancel()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for writer in self._writers:
            writer.transport.abort()  # a mere close waits for the other side's goodbye
        await asyncio.sleep(0)

    async def _accept(self) -> None:
        joined = set()
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            client.setblocking(False)
            task = asyncio.create_task(self._join(client))
            joined.add(task)
            task.add_done_callback(joined.discard)

    async def _join(self, client: socket.socket) -> None:
        try:
            is_plain = self._takes_plain and await _first_byte(client) != TLS_HANDSHAKE
            reader, writer = await _take(client, None if is_plain else self._context)
        except OSError:
            client.close()
            return
        self._writers.add(writer)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:  # nobody there: so are we
            writer.close()
            return
        self._writers.add(upstream[1])
        await asyncio.gather(_pump(reader, upstream[1]), _pump(upstream[0], writer))


async def _first_byte(client: socket.socket) -> bytes:
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(client, is_there.set)
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(client)
    return client.recv(1, socket.MSG_PEEK)


async def _take(
    client: socket.socket, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, client, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()
