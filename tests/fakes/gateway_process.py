"""`promptmill gateway` as a process: started, known to answer, ended with all that it has started."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx2 as httpx

from tests.fakes.ports import free_port
from tests.fakes.waiting import wait_until
from worker.started_process import StartedProcess


class GatewayProcess:
    """Leads a process group of its own: its carrier is in it."""

    def __init__(self, redis_url: str, log: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [sys.executable, "-m", "producer", "gateway", "--http-port", str(self.port)]
        with log.open("ab") as sink:
            self.process = StartedProcess(
                [*command, "--redis-url", redis_url, *options], stdout=sink, stderr=sink, start_new_session=True
            )

    def wait_until_it_answers(self) -> Self:
        wait_until(self._answers_or_fails, "the gateway")
        return self

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/live", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """With its carrier; one that has ended already may have left that."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers_or_fails(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        return self.answers()
