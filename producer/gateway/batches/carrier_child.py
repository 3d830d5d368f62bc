"""The gateway's side of its carrier process: started when a batch has no carrier, and again if it dies or hangs.

Every replica looks for such batches; which of their carriers gets one is decided in Redis.
"""

import asyncio
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress

from producer.gateway.background_loop import BackgroundLoop
from producer.gateway.batches.batch_records import BatchRecords
from producer.gateway.settings import GatewaySettings

COMMAND = (sys.executable, "-P", "-m", "producer.gateway.batches.carrier_process")
LOOK_SECONDS = 1.0
MAX_RESTART_SECONDS = 30.0
STOP_SECONDS = 10.0  # for what is under way to be written down
HUNG_SECONDS = 60.0  # without a sign of life; there is one a second, but a start on a busy machine takes a while

_log = logging.getLogger(__name__)


class CarrierChild(BackgroundLoop):
    """Wake it when there is a new batch."""

    def __init__(self, settings: GatewaySettings, records: BatchRecords, *, hung_seconds: float = HUNG_SECONDS) -> None:
        super().__init__("batches", retry_seconds=LOOK_SECONDS)
        self._settings = settings
        self._hung_seconds = hung_seconds
        self._heard_at = 0.0
        self._records = records
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_seconds = LOOK_SECONDS

    async def aclose(self) -> None:
        await super().aclose()
        if self._process is not None:
            await asyncio.to_thread(_stop, self._process)

    async def _turn(self) -> float:
        await self._look()
        return self._pause_seconds

    async def _look(self) -> None:
        is_alive = self._process is not None and self._process.poll() is None  # poll() also reaps one that has ended
        if not await self._records.num_without_carrier():
            return
        if self._process is not None and is_alive:
            if not self._is_hung(self._process):
                self._tell("")
                return
            _log.error("action=batch_carrier_hung pid=%s seconds=%g", self._process.pid, self._hung_seconds)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._process is not None:
            self._note_end(self._process)
        self._process = await asyncio.to_thread(_start)
        self._heard_at = time.monotonic()
        self._tell(self._settings.model_dump_json())

    def _is_hung(self, process: "subprocess.Popen[bytes]") -> bool:
        assert process.stdout is not None
        if process.stdout.read():  # whatever signs of life have come since the last look
            self._heard_at = time.monotonic()
        return time.monotonic() - self._heard_at > self._hung_seconds

    def _tell(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended, and is started anew
            self._process.stdin.write(line.encode() + b"\n")

    def _note_end(self, process: "subprocess.Popen[bytes]") -> None:
        """After a crash, each restart waits longer."""
        _close(process)
        if process.returncode == 0:
            self._pause_seconds = LOOK_SECONDS
            return
        _log.error("action=batch_carrier_died code=%s", process.returncode)
        self._pause_seconds = min(self._pause_seconds * 2, MAX_RESTART_SECONDS)


def _start() -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)  # so that a child that hangs does not block us
    return process


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Its input's end tells it to stop."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _close(process)
