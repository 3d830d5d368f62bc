"""Whether a batch's input can be run at all, and on which queue: what is wrong is named with its line's number.

Only what makes a line part of this batch is checked here. What a request asks for is checked when its turn comes: a bad
value among 50,000 good ones is one line of the error file.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from producer.batch.line_index import ParsedLine
from producer.batch.lines import BadLineError, BatchLine
from producer.contract import ErrorCode, WorkerInfo, keys
from producer.embeddings import is_list_of_inputs
from producer.gateway.batches.batch_record import BatchProblem, BatchRecord
from producer.openai.embeddings import EMBEDDINGS_URL
from producer.workers import choose_queue, drains

MAX_LINES = 50_000
MAX_INPUTS = 50_000  # to embed, of all lines together
MAX_PROBLEMS = 100  # listed; the file is not read further

_PARAMS = {
    "missing_custom_id": "custom_id",
    "duplicate_custom_id": "custom_id",
    "invalid_method": "method",
    "invalid_url": "url",
    "invalid_body": "body",
}


class EndOfCheckError(Exception):
    """Enough is wrong, or the check is not wanted any more: the rest of the file need not be read."""


class InputCheck:
    """Shown each line in turn (`see`), then asked for its `problems`."""

    def __init__(self, record: BatchRecord, is_unwanted: Callable[[], bool]) -> None:
        self._endpoint = record.endpoint
        self._is_unwanted = is_unwanted
        self._num_lines = 0
        self._num_inputs = 0
        self._problems: list[BatchProblem] = []
        self._model_line = 0
        self.model: str | None = None
        self.was_broken_off = False
        """The check was interrupted: there may be more lines."""

    @property
    def problems(self) -> list[BatchProblem]:
        if not self._num_lines:
            return [BatchProblem(code="empty_file", message="the input file has no lines", param="input_file_id")]
        return self._problems

    def see(self, number: int, line: ParsedLine) -> None:
        """Raises EndOfCheckError."""
        self._num_lines += 1
        if self._num_lines > MAX_LINES:
            self._refuse("too_many_lines", f"has more than {MAX_LINES} lines")
        if isinstance(line, BadLineError):
            self._note(number, line.code, str(line), _PARAMS.get(line.code))
        else:
            self._see_line(number, line)
        self.was_broken_off = self._is_unwanted()
        if len(self._problems) >= MAX_PROBLEMS or self.was_broken_off:
            raise EndOfCheckError

    def _refuse(self, code: str, why: str) -> NoReturn:
        """The file as a whole."""
        message = f"the input file {why}; make several batches of it"
        self._problems = [BatchProblem(code=code, message=message, param="input_file_id")]
        raise EndOfCheckError

    def _see_line(self, number: int, line: BatchLine) -> None:
        if line.url != self._endpoint:
            rule = f"url: must be the batch's endpoint, {self._endpoint}; got {line.url}"
            self._note(number, "url_mismatch", rule, "url")
        if line.url == EMBEDDINGS_URL:
            given: Any = line.body.get("input")
            self._num_inputs += len(given) if is_list_of_inputs(given) else 1
            if self._num_inputs > MAX_INPUTS:
                self._refuse("too_many_inputs", f"has more than {MAX_INPUTS} inputs to embed, all lines together")
        model: Any = line.body.get("model")
        if not isinstance(model, str) or not model:
            self._note(number, "missing_model", f"body.model: must name a model; got {model!r:.80}", "body.model")
        elif self.model is None:
            self.model, self._model_line = model, number
        elif model != self.model:
            rule = f"body.model: one model a batch: line {self._model_line} has {self.model!r}; got {model!r:.80}"
            self._note(number, "mismatched_model", rule, "body.model")

    def _note(self, number: int, code: str, message: str, param: str | None) -> None:
        self._problems.append(BatchProblem(code=code, message=message, line=number, param=param))


def choose_batch_queue(workers: list[WorkerInfo], model: str, default_queue: str, tenant: str | None) -> str | None:
    """The low class of the model's queue, if a worker serves that class: behind everybody who waits for an answer.

    None: workers are alive, and none serves the model. While none is alive at all, the default queue is taken.
    """
    queue = choose_queue(workers, model, default_queue) if workers else default_queue
    if queue is None:
        return None
    low = keys.class_queue(queue, "low")
    return keys.tenant_queue(low if not workers or drains(workers, low, model) else queue, tenant)


def model_problem(model: str, workers: list[WorkerInfo]) -> BatchProblem:
    served = ", ".join(sorted({name for worker in workers for name in worker.models})) or "none"
    message = f"body.model: no live worker serves {model!r}; served are: {served}"
    return BatchProblem(code=ErrorCode.MODEL_NOT_FOUND.value, message=message, param="body.model")
