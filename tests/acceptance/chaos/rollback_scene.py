"""Workers at a Redis that dies again and again and comes back from an older file: what it said since is gone."""

import random
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import redis

from tests.acceptance.chaos.scene_workers import start_worker
from tests.fakes.ports import free_port
from worker.embedded_redis import EmbeddedRedis
from worker.redis_client import connect

LEASE_SECONDS = 2.0
MAX_LOST_SECONDS = 4.0


class RollbackScene:
    """As `Scene`."""

    store = None
    keeps_all = False  # a claim that was lost: another attempt of the same number writes other entries

    def __init__(self, stack: ExitStack, folder: Path, rng: random.Random) -> None:
        self._rng = rng
        self._data, self._copy = folder / "redis", folder / "copy"
        self._server = stack.enter_context(EmbeddedRedis(data_dir=self._data, port=free_port(), fsync="always"))
        self.url = self.lossy_url = self._server.url
        for _ in range(rng.randint(1, 3)):
            start_worker(stack, self.url, rng, (0.005, 0.02, 0.05), lease_seconds=LEASE_SECONDS)

    def connect(self) -> redis.Redis:
        return connect(self.url)

    def wait_until_stored(self) -> None:
        """What is enqueued must not be lost: that would be a job which nobody has."""
        self._keep()

    def hurt(self) -> str:
        rng, lost = self._rng, self._rng.uniform(0.0, MAX_LOST_SECONDS)
        time.sleep(lost)
        self._server.kill()
        shutil.rmtree(self._data)
        shutil.copytree(self._copy, self._data)
        time.sleep(rng.choice((0.0, 0.0, 1.0)))
        self._server.start()
        if rng.random() < 0.7:
            self._keep()
        return f"Redis came back as it was {lost:.1f} s before, or more"

    def heal(self) -> None:
        """It has come back."""

    def _keep(self) -> None:
        """A file that ends amid a command is read up to there."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._data, self._copy)
