"""Waiting for what another thread or process does, and tells nobody."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 120.0
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.01, 0.05


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Polls until the condition holds; returns its value."""
    begun_at = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begun_at
        assert waited < WAIT_SECONDS, f"{what} did not come about in {WAIT_SECONDS:g} s"
        time.sleep(_pause(waited))
    return value


async def eventually(condition: Callable[[], Any]) -> Any:
    """The same in an event loop; what the condition returns may have to be awaited."""
    begun_at = time.monotonic()
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        waited = time.monotonic() - begun_at
        assert waited < WAIT_SECONDS, f"it did not come to that in {WAIT_SECONDS:g} s"
        await asyncio.sleep(_pause(waited))


def _pause(waited: float) -> float:
    """A look may be an HTTP request: who waits for a process to start takes no core from it."""
    return min(max(MIN_POLL_SECONDS, waited / 20), MAX_POLL_SECONDS)
