"""Real processes: `promptmill worker` on a real Redis, with the demo model, as a user would start them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from producer import Client
from tests.fakes.chat_templates import HERMES, LLAMA
from tests.fakes.gateway_process import GatewayProcess
from worker.embedded_redis import EmbeddedRedis
from worker.started_process import StartedProcess

MODEL = "smollm2-135m"
START_SECONDS = 180.0  # the demo model's first start dequantises it into the cache


@dataclass
class System:
    """A Redis and the workers started on it; `stop` ends them all by pid."""

    url: str
    log_dir: Path
    processes: list[StartedProcess] = field(default_factory=list)
    gateway_url: str = ""  # once there is one

    def environment(self, **extra: str) -> dict[str, str]:
        ours = {
            "PROMPTMILL_REDIS_URL": self.url,
            "PROMPTMILL_MODEL": MODEL,
            "PROMPTMILL_NUM_THREADS": "1",  # several would wait for each other where other tests have the cores
        }
        return {**os.environ, **ours, **extra}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "producer", *arguments]

    def start_worker(self, *arguments: str, wait: bool = True, **environment: str) -> StartedProcess:
        log = (self.log_dir / f"worker-{len(self.processes)}.log").open("wb")
        process = StartedProcess(
            self.command("worker", *arguments), env=self.environment(**environment), stdout=log, stderr=log
        )
        log.close()
        self.processes.append(process)
        if wait:
            self.wait_for_worker(process)
        return process

    def wait_for_worker(self, process: StartedProcess) -> None:
        with Client(self.url) as client:
            end = time.monotonic() + START_SECONDS
            while not any(info.pid == process.pid for info in client.workers()):
                assert process.poll() is None and time.monotonic() < end, self.logs()
                time.sleep(0.1)

    def start_gateway(self) -> None:
        gateway = GatewayProcess(self.url, self.log_dir / "gateway.log")
        self.gateway_url = gateway.url
        self.processes.append(gateway.process)
        gateway.wait_until_it_answers()

    def run(self, *arguments: str, timeout: float = 120, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`promptmill ARGUMENTS`, waited for."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.log_dir.glob("*.log")))

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def system_with_tools(folder: Path, tool_parser: str, chat_template: str | None = None) -> Iterator[System]:
    """A Redis and one worker whose model is shown tools by a template of the operator's."""
    template = folder / "template.jinja"
    template.write_text(chat_template or {"hermes": HERMES, "llama": LLAMA}[tool_parser])
    with EmbeddedRedis() as server:
        system = System(server.url, folder)
        try:
            system.start_worker("--chat-template", str(template), "--tool-parser", tool_parser)
            yield system
        finally:
            system.stop()


def remaining_keys(url: str, patterns: list[str]) -> list[str]:
    """Keys under `patterns` that are still there."""
    with redis.Redis.from_url(url, decode_responses=True) as connection:
        return sorted(key for pattern in patterns for key in connection.scan_iter(pattern))
