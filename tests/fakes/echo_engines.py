"""Engines whose core echoes, on a thread or in a real process, and what tests ask of such a process."""

import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from engine import InferenceEngine, SamplingParams
from engine.process import ChildProcess
from tests.fakes.child_thread import ChildThread
from tests.fakes.fake_core import CORE_PATH, write_fake_model
from tests.fakes.waiting import wait_until

POISON, SOUND = 7, 9  # first tokens of prompts
ENDLESS = SamplingParams(max_tokens=None)


def echo_engine(folder: Path, **script: object) -> InferenceEngine:
    return InferenceEngine(write_fake_model(folder, **script), _start_child=partial(ChildThread, core_path=CORE_PATH))


def process_engine(folder: Path, fields: dict[str, Any] | None = None, **script: object) -> InferenceEngine:
    return InferenceEngine(
        write_fake_model(folder, **script), _start_child=partial(ChildProcess, core_path=CORE_PATH), **fields or {}
    )


def child_pid(engine: InferenceEngine) -> int:
    assert engine._supervisor is not None
    child = engine._supervisor._child.running
    assert isinstance(child, ChildProcess)
    return child.pid


def wait_for_restarts(engine: InferenceEngine, num_restarts: int) -> None:
    wait_until(lambda: engine.get_stats()["num_restarts"] >= num_restarts, "the restarts")


class DeathWatch(logging.Handler):
    """Notes when the supervisor reports a death, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()
        self.seen_at = 0.0
        self.report = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.seen.is_set():
            self.seen_at, self.report = time.monotonic(), record.getMessage()
            self.seen.set()


def echo(prompt: list[int], num_tokens: int) -> list[int]:
    return [prompt[i % len(prompt)] for i in range(num_tokens)]
