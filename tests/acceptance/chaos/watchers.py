"""Subscribers that leave and come back: one for each job, all on one event loop in a thread of its own."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from producer import AsyncClient, JobNotFoundError, RedisUnavailableError
from producer.contract import Chunk
from producer.subscription import StreamEnd
from tests.acceptance.chaos.workload import ChaosJob

MAX_VISITS_ANEW = 20  # from then on a subscriber goes on where it was: long streams are read to their ends, too


@dataclass(slots=True)
class Watched:
    """What one subscriber saw of one job, since the last reset."""

    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: Counter[int] = field(default_factory=Counter)  # by choice
    num_resets: int = 0
    num_visits: int = 0
    has_ended: bool = False
    end: StreamEnd | None = None
    """What it was told behind the last chunk; None of a job that failed."""
    problem: str | None = None
    cursor: str | None = None

    def take(self, chunk: Chunk) -> None:
        if chunk.reset:
            self.forget()
            self.num_resets += 1
            return
        if chunk.token_offset != self.num_tokens[chunk.index]:
            self.problem = f"token_offset {chunk.token_offset} behind {self.num_tokens[chunk.index]} tokens"
        self.num_tokens[chunk.index] += len(chunk.token_ids)
        self.chunks.append(chunk)

    def forget(self) -> None:
        self.chunks.clear()
        self.num_tokens.clear()
        self.cursor = None


class Watchers:
    """Watch every job from the start of the block to its end, or to the end of the block."""

    def __init__(self, url: str, jobs: Sequence[ChaosJob], *, seed: int, keep_cursors: bool = True) -> None:
        """Without `keep_cursors`, who comes back begins anew."""
        self._url = url
        self._keep_cursors = keep_cursors
        self._seed = seed
        self.seen = {job.job_id: Watched() for job in jobs}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch_all()), name="watchers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout: float) -> None:
        """Until every watcher has seen its job's end, at most so long."""
        self._thread.join(timeout)
        self._is_over.set()
        self._thread.join(30)

    async def _watch_all(self) -> None:
        async with AsyncClient(self._url) as client:
            tasks = [asyncio.create_task(self._watch(client, job_id)) for job_id in self.seen]
            while any(not task.done() for task in tasks) and not self._is_over.is_set():
                await asyncio.wait(tasks, timeout=0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, client: AsyncClient, job_id: str) -> None:
        rng = random.Random(f"{self._seed} {job_id}")
        watched = self.seen[job_id]
        while not watched.has_ended:
            begins_anew = watched.num_visits < MAX_VISITS_ANEW and rng.random() < 0.3
            if watched.cursor is not None and (
                begins_anew or not self._keep_cursors
            ):  # another reader, which saw nothing yet
                watched.forget()
            watched.num_visits += 1
            try:
                await self._visit(client, job_id, rng.randint(1, 60) if self._keep_cursors else None)
            except (JobNotFoundError, RedisUnavailableError):  # not submitted yet
                pass
            except Exception as error:  # of any type: it is what this test looks for
                watched.problem, watched.has_ended = repr(error), True
            if not watched.has_ended:
                await asyncio.sleep(rng.uniform(0.0, 0.5))

    async def _visit(self, client: AsyncClient, job_id: str, max_chunks: int | None) -> None:
        """Read some chunks, and leave in the middle or at the end."""
        watched = self.seen[job_id]
        num_chunks, chunks = 0, client.stream(job_id, after=watched.cursor)
        try:
            async for chunk in chunks:
                watched.take(chunk)
                watched.cursor = chunks.last_id
                num_chunks += 1
                if num_chunks == max_chunks:
                    return
            watched.has_ended, watched.end = True, chunks.end
        finally:
            await chunks.aclose()
