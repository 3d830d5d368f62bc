"""The processes of a chaos run: a Redis, and workers that reach it through proxies of their own."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from producer import Client
from tests.fakes.processes import all_processes, children_of
from tests.fakes.redis_proxy import CuttingProxy
from worker.embedded_redis import EmbeddedRedis
from worker.started_process import StartedProcess

START_SECONDS = 120.0
STOP_SECONDS = 20.0


@dataclass(slots=True)
class Slot:
    """One worker, whatever process it has now."""

    number: int
    proxy: CuttingProxy
    process: StartedProcess | None = None
    num_starts: int = 0
    start_at: float = 0.0
    """Monotonic seconds: an ended process is not replaced before."""
    exit_codes: list[int] = field(default_factory=list)
    stopped_pids: list[int] = field(default_factory=list)

    @property
    def is_stopped(self) -> bool:
        return bool(self.stopped_pids)


class Fleet:
    """Methods that hurt do so and return at once; `start` and `wake` make it good again."""

    def __init__(self, redis: EmbeddedRedis, command: Sequence[str], log_dir: Path, *, num_workers: int) -> None:
        """`command` starts a worker; PROMPTMILL_REDIS_URL is set for it."""
        self.redis = redis
        self._command = list(command)
        self._log_dir = log_dir
        self.is_redis_up = True
        self._sessions: set[int] = set()
        self.slots = [Slot(at, CuttingProxy(redis.port, seed=at)) for at in range(num_workers)]

    def __enter__(self) -> "Fleet":
        for slot in self.slots:
            slot.proxy.__enter__()
            self.start(slot)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for slot in self.slots:
            self.wake(slot)
            if slot.process is not None:
                slot.process.kill()
                slot.process.wait()
            slot.proxy.__exit__()

    def start(self, slot: Slot) -> None:
        """A new process, unless the slot has one that runs (it may still be ending: `wait_until_all_serve`)."""
        if slot.process is not None and slot.process.poll() is None:
            return
        if slot.process is not None:
            slot.exit_codes.append(slot.process.returncode)
        slot.num_starts += 1
        with (self._log_dir / f"worker-{slot.number}-{slot.num_starts}.log").open("wb") as log:
            slot.process = StartedProcess(
                self._command,
                env={**os.environ, "PROMPTMILL_REDIS_URL": slot.proxy.url},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._sessions.add(slot.process.pid)

    def start_ended(self) -> None:
        """What a supervisor does: a new process for each that ended, once its time has come."""
        for slot in self.slots:
            if time.monotonic() >= slot.start_at:
                self.start(slot)

    def kill_redis(self) -> None:
        if self.is_redis_up:
            self.redis.kill()
            self.is_redis_up = False

    def start_redis(self) -> None:
        if not self.is_redis_up:
            self.redis.start()
            self.is_redis_up = True

    def kill(self, slot: Slot) -> None:
        if slot.process is not None:
            slot.process.kill()
            slot.process.wait()
            self.wake(slot)  # its engine sees that nobody is left

    def kill_child(self, slot: Slot) -> None:
        for pid in self._children(slot):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def hang_child(self, slot: Slot) -> None:
        """One that the worker kills meanwhile has no need to be woken."""
        if not slot.is_stopped:
            self._stop_all(slot, self._children(slot))

    def terminate(self, slot: Slot) -> None:
        """SIGTERM; a worker that is stopped gets it when it is woken."""
        if slot.process is not None:
            slot.process.terminate()

    def stop(self, slot: Slot, *, with_child: bool) -> None:
        if slot.process is None or slot.process.poll() is not None:
            return
        self._stop_all(slot, [slot.process.pid, *(self._children(slot) if with_child else [])])

    def _stop_all(self, slot: Slot, pids: list[int]) -> None:
        slot.stopped_pids = sorted({*slot.stopped_pids, *pids})
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def wake(self, slot: Slot) -> None:
        for pid in slot.stopped_pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        slot.stopped_pids = []

    def wait_until_all_serve(self, url: str) -> None:
        end = time.monotonic() + START_SECONDS
        with Client(url) as client:
            while True:
                served = {info.pid for info in client.workers()}
                missing = [
                    slot  # what a killed worker said of itself outlives it by a few seconds
                    for slot in self.slots
                    if slot.process is None or slot.process.poll() is not None or slot.process.pid not in served
                ]
                if not missing:
                    return
                for slot in missing:
                    self.start(slot)
                assert time.monotonic() < end, f"worker {missing[0].number} does not serve"
                time.sleep(0.1)

    def shut_down(self) -> list[int]:
        """SIGTERM to every worker; their exit codes."""
        for slot in self.slots:
            self.terminate(slot)
        return [slot.process.wait(STOP_SECONDS) for slot in self.slots if slot.process is not None]

    def orphans(self) -> list[int]:
        """Processes that workers started and left behind when they ended."""
        running = {slot.process.pid for slot in self.slots if slot.process is not None and slot.process.poll() is None}
        return [entry.pid for entry in all_processes() if entry.session in self._sessions - running]

    def logs(self) -> dict[str, str]:
        return {path.name: path.read_text(errors="replace") for path in sorted(self._log_dir.glob("*.log"))}

    def _children(self, slot: Slot) -> list[int]:
        return [] if slot.process is None else children_of(slot.process.pid)
