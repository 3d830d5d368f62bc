"""A caller of the file stores' threads that is cancelled."""

import asyncio
import threading
from collections.abc import Iterator

import anyio
import pytest

from producer.gateway.files.threads import FileThreads


async def test_who_is_cancelled_twice_still_waits_for_the_thread() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(60)
        ended.set()

    caller = asyncio.create_task(FileThreads().run(work))
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


async def test_chunks_are_closed_once_the_thread_has_left_them() -> None:
    begun, may_end = threading.Event(), threading.Event()
    seen: list[str] = []

    def read() -> Iterator[bytes]:
        try:
            begun.set()
            may_end.wait(60)
            seen.append("read")
            yield b"a chunk"
        finally:
            seen.append("closed")

    async def iterate() -> None:
        async for _ in FileThreads().iterate(read()):
            pass

    async with anyio.create_task_group() as group:  # as starlette runs the body of a response
        group.start_soon(iterate)
        await asyncio.to_thread(begun.wait, 60)
        group.cancel_scope.cancel()
        asyncio.get_running_loop().call_later(0.05, may_end.set)
    assert seen == ["read", "closed"]
