"""Ends tasks of an event loop for good: cancelled, waited for, and cancelled again where that came to nothing."""

import asyncio
from typing import Any

CANCEL_SECONDS = 0.1  # before a task is cancelled once more: up to Python 3.11 `asyncio.wait_for` may swallow one


async def end_tasks(*tasks: "asyncio.Task[Any]") -> None:
    """What they hold open is closed when this returns, and no outcome of theirs is left unseen."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
