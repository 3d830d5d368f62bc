"""What becomes of files without anybody's doing: the expired are deleted, and bytes that belong to no file.

Any replica does it and several may at once: what is due stays due until it is gone, and is deleted by name.
"""

import asyncio
import logging
from contextlib import suppress

from producer.end_tasks import end_tasks
from producer.errors import PromptmillError
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecords
from producer.gateway.files.threads import FileThreads

INTERVAL_SECONDS = 30.0

_log = logging.getLogger(__name__)


class FileHousekeeping:
    def __init__(self, files: FileRecords, store: FileStore, threads: FileThreads) -> None:
        self._files = files
        self._store = store
        self._threads = threads
        self._is_wanted = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def want(self) -> None:
        """Not to wait for the next turn: something has just been deleted."""
        self._is_wanted.set()

    def start(self) -> None:
        """The first turn comes at once."""
        self._loop = asyncio.create_task(self._run(), name="file housekeeping")

    async def aclose(self) -> None:
        if self._loop is not None:
            await end_tasks(self._loop)

    async def _run(self) -> None:
        while True:
            self._is_wanted.clear()
            try:
                await self.clean_up()
            except PromptmillError as error:
                _log.warning("action=file_housekeeping_delayed error=%s", error)
            except Exception:  # of any type: what expires must go on expiring
                _log.exception("action=file_housekeeping_delayed")
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_SECONDS):
                    await self._is_wanted.wait()

    async def clean_up(self) -> None:
        """All that is due now. Raises a PromptmillError where the rest must wait."""
        while ids := await self._files.expire():
            _log.info("action=files_expired num=%d", len(ids))
        while parts := await self._files.due_parts():
            outcomes = await asyncio.gather(*(self._delete(part) for part in parts), return_exceptions=True)
            failure = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
            if failure is not None:
                raise failure
            _log.info("action=file_parts_deleted num=%d", len(parts))

    async def _delete(self, part: str) -> None:
        await self._threads.run(self._store.delete, part)
        await self._files.forget(part)
