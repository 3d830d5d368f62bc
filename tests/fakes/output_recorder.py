"""Keeps a request's outputs and lets a test wait for them."""

import threading
from collections.abc import Callable

from engine.outputs import RequestOutput
from tests.fakes.waiting import WAIT_SECONDS


class OutputRecorder:
    """Pass it as `on_output`."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._changed = threading.Condition()

    def __call__(self, output: RequestOutput) -> None:
        with self._changed:
            self.outputs.append(output)
            self._changed.notify_all()

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    def wait_for(self, condition: Callable[["OutputRecorder"], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), WAIT_SECONDS), self.outputs[-3:]

    def wait_for_tokens(self, num_tokens: int) -> None:
        self.wait_for(lambda recorder: len(recorder.token_ids) >= num_tokens)

    def wait_for_count(self, num_outputs: int) -> None:
        self.wait_for(lambda recorder: len(recorder.outputs) >= num_outputs)

    def wait_for_end(self) -> RequestOutput:
        self.wait_for(lambda recorder: bool(recorder.outputs) and recorder.outputs[-1].finished)
        return self.outputs[-1]
