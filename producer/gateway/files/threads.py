"""Threads for the stores, which block: a limited number, and a caller that is cancelled waits for its own."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

import anyio

NUM_THREADS = 16

P = ParamSpec("P")
T = TypeVar("T")


class FileThreads:
    """Never shut down: an upload that is cut off by the process's end still removes what it wrote."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="files")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Cancelled, and however often, it waits for the function's end: a thread cannot be stopped. Nobody may remove
        a part that one still writes to, and to close a generator that one still runs crashes Python 3.11."""
        running = asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # anyio, which starlette runs on, cancels again on every turn of the loop.
            with anyio.CancelScope(shield=True):
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])
            raise

    async def iterate(self, chunks: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Leaving it closes `chunks`, where that is a generator."""
        try:
            while (chunk := await self.run(next, chunks, None)) is not None:
                yield chunk
        finally:
            if (close := getattr(chunks, "close", None)) is not None:
                close()
