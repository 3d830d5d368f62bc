"""Collects the engine's outputs of one step into one event of the loop, so that their jobs share an append and the loop
wakes once.

Coalescing happens in the engine, where later steps' tokens are added; what arrives here is written at once.

Filled on the engine's thread. Knows nothing about jobs except whose each output is.
"""

from collections import deque
from collections.abc import Callable

from engine.engine import InferenceEngine
from engine.outputs import RequestOutput
from worker.event_queue import Event
from worker.running_job import RunningJob

COALESCE_SECONDS = 0.03  # outputs of a job within this time share one append


class StepOutputs:
    """`post` runs a callable on the loop's thread, where `take` then gets each output, in order."""

    def __init__(
        self,
        engine: InferenceEngine,
        *,
        post: Callable[[Event], None],
        take: Callable[[RunningJob, RequestOutput], None],
    ) -> None:
        self._post = post
        self._take = take
        self._outputs: deque[tuple[RunningJob, RequestOutput]] = deque()
        engine.after_outputs = self._hand_over
        engine.output_interval_seconds = COALESCE_SECONDS

    def add(self, job: RunningJob, output: RequestOutput) -> None:
        self._outputs.append((job, output))

    def _hand_over(self) -> None:
        if self._outputs:
            self._post(self._take_all)

    def _take_all(self) -> None:
        while self._outputs:
            self._take(*self._outputs.popleft())
