"""What the engine gives at a time, as one event of the loop: its jobs share an append, and the loop wakes once.

It waits in the engine, where the tokens of later steps join it; what comes here goes to Redis at once.

Fills on the engine's thread. Knows nothing of jobs but whose an output is.
"""

from collections import deque
from collections.abc import Callable

from engine.engine import InferenceEngine
from engine.outputs import RequestOutput
from worker.event_queue import Event
from worker.running_job import RunningJob

COALESCE_SECONDS = 0.03  # what a job puts out within this time shares one append


class StepOutputs:
    """`post` runs a callable on the loop's thread, where `take` is then given each output, in order."""

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
