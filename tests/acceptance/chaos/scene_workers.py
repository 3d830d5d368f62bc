"""Workers on threads, as scenes have them: each as fast and as wide as chance will have it."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tests.fakes.fake_engine import FakeEngine
from tests.fakes.worker_runs import WorkerThread


def start_worker(
    stack: ExitStack, url: str, rng: random.Random, step_seconds: Sequence[float], **settings: Any
) -> None:
    engine = FakeEngine(step_seconds=rng.choice(step_seconds))
    stack.enter_context(WorkerThread(url, engine, max_num_seqs=rng.choice((4, 16, 32)), **settings))
