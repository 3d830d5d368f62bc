"""Gateways as processes, each with a way to Redis of its own, and what may happen to them and to their carriers."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.ports import free_port
from tests.fakes.processes import children_of

START_SECONDS = 60.0
LEASE_SECONDS = 3.0  # of a batch
NUM_GATEWAYS = 2


class GatewaySlot:
    """One gateway at one address, whatever process it has now."""

    def __init__(self, number: int, redis_url: str, options: list[str], log_dir: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._redis_url = redis_url
        self._options = [*options, "--batch-lease-seconds", str(LEASE_SECONDS), "--http-drain-seconds", "1"]
        self._log = log_dir / f"gateway-{number}.log"
        self._gateway: GatewayProcess | None = None
        self._start_at = 0.0
        self._stopped: list[int] = []
        self._wake_at = 0.0

    @property
    def carriers(self) -> list[int]:
        return [] if self._gateway is None else children_of(self._gateway.process.pid)

    def look_after(self) -> None:
        """What a supervisor does: a new process for one that ended; those that stand still are woken."""
        now = time.monotonic()
        if self._stopped and now >= self._wake_at:
            self.wake()
        if (self._gateway is None or self._gateway.process.poll() is not None) and now >= self._start_at:
            self._gateway = GatewayProcess(self._redis_url, self._log, *self._options, port=self.port)

    def wake(self) -> None:
        for pid in self._stopped:
            _signal(pid, signal.SIGCONT)
        self._stopped = []

    def kill(self, seconds: float) -> None:
        """With its carrier, as when a machine goes; `seconds` until it is there again."""
        if self._gateway is not None:
            self._gateway.kill()
            self._stopped = []
            self._start_at = time.monotonic() + seconds

    def terminate(self, seconds: float) -> None:
        if self._gateway is not None:
            self._gateway.process.terminate()
            self._start_at = time.monotonic() + seconds

    def kill_carrier(self) -> None:
        for pid in self.carriers:
            _signal(pid, signal.SIGKILL)

    def stop(self, seconds: float, *, only_carrier: bool) -> None:
        """SIGSTOP for so long: beyond the lease it wakes with batches that are others'."""
        if self._gateway is not None and not self._stopped:
            self._stopped = [*self.carriers, *([] if only_carrier else [self._gateway.process.pid])]
            self._wake_at = time.monotonic() + seconds
            for pid in self._stopped:
                _signal(pid, signal.SIGSTOP)

    def answers(self) -> bool:
        return self._gateway is not None and self._gateway.answers()


class GatewayFleet:
    def __init__(self, redis_urls: list[str], options: list[str], log_dir: Path) -> None:
        self.slots = [GatewaySlot(at, url, options, log_dir) for at, url in enumerate(redis_urls)]

    def __enter__(self) -> "GatewayFleet":
        self.heal()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for slot in self.slots:
            slot.kill(0.0)

    def look_after(self) -> None:
        for slot in self.slots:
            slot.look_after()

    def hurt(self, rng: random.Random) -> str:
        """One fault; what it was."""
        slot, seconds = rng.choice(self.slots), rng.uniform(0.5, 2.5) * LEASE_SECONDS
        match rng.randrange(5):
            case 0:
                slot.kill(rng.uniform(0.0, 2.0))
                return "gateway killed"
            case 1:
                slot.terminate(0.0)
                return "gateway told to stop"
            case 2:
                slot.kill_carrier()
                return "carrier killed"
            case 3:
                slot.stop(seconds, only_carrier=True)
                return f"carrier stands still for {seconds:.1f} s"
            case _:
                slot.stop(seconds, only_carrier=False)
                return f"gateway stands still for {seconds:.1f} s"

    def heal(self) -> None:
        """Returns once each answers."""
        end = time.monotonic() + START_SECONDS
        for slot in self.slots:
            slot.wake()
        while not all(slot.answers() for slot in self.slots):
            self.look_after()
            assert time.monotonic() < end, "a gateway does not answer"
            time.sleep(0.1)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
