"""What a Redis with TLS looks like from outside: TLS on a port of its own, before a server that speaks none."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme


@contextmanager
def tls_front(upstream_port: int, *, ca_file: Path | None = None) -> Iterator[int]:
    """The port. Its certificate is from nobody whom anybody trusts, but who is told to by `ca_file`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    if ca_file is not None:
        authority.cert_pem.write_to_path(str(ca_file))
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ports: list[int] = []
    is_up = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream = await asyncio.open_connection("127.0.0.1", upstream_port)
            await asyncio.gather(_pump(reader, upstream[1]), _pump(upstream[0], writer))

        async with await asyncio.start_server(join, "127.0.0.1", 0, ssl=context) as server:
            ports.append(server.sockets[0].getsockname()[1])
            is_up.set()
            await stop.wait()
        for connection in asyncio.all_tasks() - {asyncio.current_task()}:
            connection.cancel()
            with suppress(asyncio.CancelledError):
                await connection

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="tls-front")
    thread.start()
    assert is_up.wait(20)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()
