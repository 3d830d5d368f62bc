"""Deletes files that have expired, and bytes that belong to no file.

Every replica does it, several may at once: what is due stays due until it is gone, and is deleted by name.
"""

import asyncio
import logging

from producer.gateway.background_loop import BackgroundLoop
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecords
from producer.gateway.files.threads import FileThreads

INTERVAL_SECONDS = 30.0

_log = logging.getLogger(__name__)


class FileHousekeeping(BackgroundLoop):
    def __init__(self, files: FileRecords, store: FileStore, threads: FileThreads) -> None:
        super().__init__("file_housekeeping", retry_seconds=INTERVAL_SECONDS)
        self._files = files
        self._store = store
        self._threads = threads

    async def _turn(self) -> float:
        await self.clean_up()
        return INTERVAL_SECONDS

    async def clean_up(self) -> None:
        """Delete all that is due now. Raises a PromptmillError if the rest must wait."""
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
