"""A task that a gateway process repeats beside its requests: an error ends one turn, not the loop."""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import suppress

from producer.end_tasks import end_tasks
from producer.errors import PromptmillError

_log = logging.getLogger(__name__)


class BackgroundLoop(ABC):
    """Calls `_turn` from `start()` to `aclose()`, the first time at once."""

    def __init__(self, name: str, *, retry_seconds: float) -> None:
        """`retry_seconds`: the pause after a turn that raised."""
        self._name = name
        self._retry_seconds = retry_seconds
        self._is_awake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=self._name)

    def wake(self) -> None:
        """Begin the next turn at once."""
        self._is_awake.set()

    async def aclose(self) -> None:
        if self._task is not None:
            await end_tasks(self._task)

    async def _run(self) -> None:
        while True:
            self._is_awake.clear()
            pause_seconds = self._retry_seconds
            try:
                pause_seconds = await self._turn()
            except PromptmillError as error:
                _log.warning("action=%s_delayed error=%s", self._name, error)
            except Exception:  # of any type: the loop must not end
                _log.exception("action=%s_delayed", self._name)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._is_awake.wait()

    @abstractmethod
    async def _turn(self) -> float:
        """Returns the seconds until the next one."""
