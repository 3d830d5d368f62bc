"""Waiting for what another thread or process does, and tells nobody."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 120.0
POLL_SECONDS = 0.01


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Polls until the condition holds; returns its value."""
    end = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come about in {WAIT_SECONDS:g} s"
        time.sleep(POLL_SECONDS)
    return value


async def eventually(condition: Callable[[], Any]) -> Any:
    """The same in an event loop; what the condition returns may have to be awaited."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"it did not come to that in {WAIT_SECONDS:g} s"
        await asyncio.sleep(POLL_SECONDS)
