"""Workers behind a Sentinel, and fail-overs: the master dies, with or without writes that were not replicated, hands
over in good order, or stands still until another has taken its place."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis

from tests.acceptance.chaos.scene_workers import start_worker
from tests.fakes.sentinel_trio import SentinelTrio
from worker.redis_client import connect

LEASE_SECONDS = 2.0
MAX_LAG_SECONDS = 1.5  # then the Sentinel would bring the replica back
PAUSE_SECONDS = 0.5  # between fail-overs, at most


class SentinelScene:
    """As `Scene`."""

    store = None
    keeps_all = False  # a claim that was lost: another attempt of the same number writes other entries

    def __init__(self, stack: ExitStack, folder: Path, rng: random.Random) -> None:
        self._rng = rng
        self._trio = stack.enter_context(SentinelTrio(folder))
        self.url = self.lossy_url = self._trio.url
        for _ in range(rng.randint(1, 3)):
            start_worker(stack, self.url, rng, (0.005, 0.02, 0.05), lease_seconds=LEASE_SECONDS)

    def connect(self) -> redis.Redis:
        return connect(self.url)

    def wait_until_stored(self) -> None:
        """What is enqueued must not be lost: that would be a job which nobody has."""
        with self.connect() as client:
            assert client.wait(1, 5000) == 1

    def hurt(self) -> str:
        time.sleep(self._rng.uniform(0.0, PAUSE_SECONDS))
        event, strike = self._rng.choice(_FAULTS)
        strike(self)
        self._trio.wait_for_promotion()
        self._trio.rejoin()
        return event

    def heal(self) -> None:
        """Every fail-over was waited for."""

    def _kill(self) -> None:
        self._trio.master.kill()

    def _kill_with_lag(self) -> None:
        self._trio.cut_off_replica()
        time.sleep(self._rng.uniform(0.0, MAX_LAG_SECONDS))
        self._kill()

    def _hand_over(self) -> None:
        self._trio.hand_over()

    def _stand_still(self) -> None:
        """It wakes as a master that nobody told of the other."""
        pid = self._trio.master.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            self._trio.wait_for_promotion()
            time.sleep(self._rng.uniform(0.0, LEASE_SECONDS))
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(self._rng.uniform(0.0, 1.0))


_FAULTS: tuple[tuple[str, Callable[[SentinelScene], None]], ...] = (
    ("master killed", SentinelScene._kill),
    ("master killed with what it had not replicated", SentinelScene._kill_with_lag),
    ("master hands over", SentinelScene._hand_over),
    ("master stands still", SentinelScene._stand_still),
)
