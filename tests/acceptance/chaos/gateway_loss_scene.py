"""Gateways, their carriers and workers at a Redis that loses what it has acknowledged: behind a Sentinel, or coming
back from older files. What was asked for before the faults is kept."""

import random
from contextlib import ExitStack
from pathlib import Path

from tests.acceptance.chaos.gateway_fleet import NUM_GATEWAYS, GatewayFleet
from tests.acceptance.chaos.rollback_scene import RollbackScene
from tests.acceptance.chaos.sentinel_scene import SentinelScene
from tests.fakes.file_stores import FolderOfFiles, PlaceOfFiles

GATEWAY_SHARE = 0.4  # of the faults


class GatewayLossScene:
    """As `GatewayScene`."""

    keeps_all = False

    def __init__(
        self, stack: ExitStack, folder: Path, seed: int, kind: type[SentinelScene] | type[RollbackScene]
    ) -> None:
        self._rng = random.Random(f"gateways of {seed}")
        self._redis = kind(stack, folder, self._rng)
        self.url = self._redis.url
        self.place: PlaceOfFiles = FolderOfFiles(folder / "files")
        options = ["--files", str(folder / "files"), "--batch-max-in-flight", "20"]
        self.gateways = stack.enter_context(GatewayFleet([self.url] * NUM_GATEWAYS, options, folder))

    def begin(self) -> None:
        """All that was asked for is kept from now on."""
        self._redis.wait_until_stored()

    def hurt(self) -> str:
        return self.gateways.hurt(self._rng) if self._rng.random() < GATEWAY_SHARE else self._redis.hurt()

    def heal(self) -> None:
        self._redis.heal()
        self.gateways.heal()
