"""Runs a file of OpenAI Batch lines through the queues: `BatchRun` for files, `BatchProtocol` for any lines.

Job ids follow from the file's content and each line's `custom_id`. A run that is broken off leaves the jobs it had
enqueued where they are; the next run of the same file finds their results, or waits for them, and runs none twice.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from producer.batch_files import BatchInput, BatchOutput
from producer.batch_lines import BadLineError, BatchLine, answer_line, bad_line, refusal_line
from producer.contract import ErrorCode, ErrorInfo, JobRequest, Result
from producer.enqueue import MAX_JOBS_A_SEND, Destination, NewJob, build_job, enqueue
from producer.errors import InvalidJobError, JobNotFoundError
from producer.openai_request import request_from_body
from producer.openai_response import invalid_job_info
from producer.operations import Emit, Protocol
from producer.results import ResultCollector
from producer.settings import ProducerSettings
from producer.transport import Transport
from producer.workers import ModelDirectory

MAX_IN_FLIGHT = 2000  # by default: enough to keep several workers busy, little enough to be cancelled
MAX_RUNS_A_LINE = 10  # times a line whose earlier job failed or was cancelled unseen is run anew

Entry = tuple[int, BatchLine | BadLineError]  # the input line's number, from 1


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """`run_id` keeps runs of one file apart: under another one every line is run anew. `model` replaces the lines'."""

    max_in_flight: int = MAX_IN_FLIGHT
    run_id: str = ""
    model: str | None = None
    priority_class: str | None = None


@dataclass(slots=True)
class BatchProgress:
    """Where a run stands. Lines that an earlier run answered count as done, and as failed; its tokens do not."""

    num_lines: int
    num_done: int
    num_failed: int
    num_output_tokens: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_second(self) -> float:
        return self.num_output_tokens / max(time.monotonic() - self.started_at, 1e-9)


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of output."""

    line: dict[str, Any]
    is_failed: bool
    num_output_tokens: int = 0


class BatchRun:
    """One input file, one output file. Raises BatchFileError for a file that cannot be used."""

    def __init__(
        self,
        settings: ProducerSettings,
        source: Path,
        target: Path,
        options: BatchOptions,
        on_progress: Callable[[BatchProgress], None],
    ) -> None:
        self._settings = settings
        self._options = options
        self._on_progress = on_progress
        self._input = BatchInput(source)
        self._output = BatchOutput(target, source)

    def run(self) -> BatchProgress:
        """Answer every line that has no answer yet; one answer is on disk before the next is asked for.

        A KeyboardInterrupt, or an error, leaves the output whole and the enqueued jobs running.
        """
        done = self._output.mend()
        self._input.scan()
        progress = BatchProgress(self._input.num_lines, done.num_lines, done.num_failed)
        self._on_progress(progress)
        protocol = BatchProtocol(
            self._input.entries(done),
            Destination.choose(self._settings.queue, None, self._options.priority_class),
            batch_id=f"{self._input.digest}:{self._options.run_id}",
            options=self._options,
        )
        transport = Transport(self._settings.redis_url, self._settings.s3_endpoint_url)
        with closing(transport), closing(transport.iterate(protocol.run())) as answers, self._output.opened() as write:
            for answer in answers:
                write(json.dumps(answer.line, ensure_ascii=False))
                progress.num_done += 1
                progress.num_failed += answer.is_failed
                progress.num_output_tokens += answer.num_output_tokens
                self._on_progress(progress)
        return progress


@dataclass(frozen=True, slots=True)
class _Item:
    number: int
    line: BatchLine
    request: JobRequest
    queue: str
    run: int  # how often the line was given a job before
    is_new: bool = False  # whether this run enqueued it


class BatchProtocol:
    """Lines in, answers out, at most `max_in_flight` jobs on the queues at a time. Knows nothing of files."""

    def __init__(
        self, entries: Iterator[Entry], destination: Destination, *, batch_id: str, options: BatchOptions
    ) -> None:
        self._entries = entries
        self._destination = destination
        self._batch_id = batch_id
        self._options = options
        self._directory = ModelDirectory()
        self._collector = ResultCollector({}, timeout=None)
        self._in_flight: dict[str, _Item] = {}
        self._is_exhausted = False

    def run(self) -> Protocol[None]:
        """Emit an `Answer` for each entry, in the order in which they end."""
        while True:
            yield from self._fill()
            if not self._in_flight:
                return
            again: list[_Item] = []
            for outcome in (yield from self._collector.next_ended()):
                item = self._in_flight.pop(outcome.job_id)
                if self._is_stale(item, outcome):
                    again.append(replace(item, run=item.run + 1))
                else:
                    yield Emit(_answer(item, outcome))
            yield from self._enqueue(again)

    def _is_stale(self, item: _Item, outcome: Result | JobNotFoundError) -> bool:
        """An earlier run's job that came to nothing, and that nobody was told of."""
        came_to_nothing = isinstance(outcome, JobNotFoundError) or outcome.status != "finished"
        return came_to_nothing and not item.is_new and item.run < MAX_RUNS_A_LINE

    def _fill(self) -> Protocol[None]:
        """Top up what is in flight, in slices: one round trip for many jobs, and none for one or two."""
        slice_size = max(1, min(MAX_JOBS_A_SEND, self._options.max_in_flight // 8))
        while not self._is_exhausted and self._options.max_in_flight - len(self._in_flight) >= slice_size:
            yield from self._enqueue((yield from self._take(slice_size)))

    def _take(self, num_items: int) -> Protocol[list[_Item]]:
        items: list[_Item] = []
        while len(items) < num_items:
            entry = next(self._entries, None)
            if entry is None:
                self._is_exhausted = True
                break
            number, line = entry
            if isinstance(line, BadLineError):
                yield Emit(Answer(bad_line(line, number=number), is_failed=True))
                continue
            try:
                items.append((yield from self._check(number, line)))
            except InvalidJobError as error:
                yield Emit(_refusal(number, line, invalid_job_info(error)))
        return items

    def _check(self, number: int, line: BatchLine) -> Protocol[_Item]:
        body = line.body if self._options.model is None else {**line.body, "model": self._options.model}
        request = request_from_body(line.url, body)
        queue = yield from self._destination.find(self._directory, request)
        return _Item(number, line, request, queue, run=0)

    def _enqueue(self, items: list[_Item]) -> Protocol[None]:
        if not items:
            return
        jobs = [self._job(item) for item in items]
        enqueued = yield from enqueue(jobs)
        for item, job in zip(items, enqueued, strict=True):
            self._in_flight[job.job_id] = replace(item, is_new=job.is_new)
        may_have_ended = not all(job.is_new for job in enqueued)
        self._collector.add({job.job_id: job.queue for job in enqueued}, may_have_ended=may_have_ended)

    def _job(self, item: _Item) -> NewJob:
        identity = json.dumps([self._batch_id, item.line.custom_id, item.run])
        job_id = f"batch-{hashlib.sha256(identity.encode()).hexdigest()[:40]}"
        return build_job(item.request, item.queue, job_id)


def _answer(item: _Item, outcome: Result | JobNotFoundError) -> Answer:
    if isinstance(outcome, JobNotFoundError):
        return _refusal(item.number, item.line, ErrorInfo(code=ErrorCode.JOB_NOT_FOUND, message=str(outcome)))
    line = answer_line(item.line, outcome, created=int(time.time()))
    return Answer(line, outcome.status != "finished", outcome.usage.completion_tokens)


def _refusal(number: int, line: BatchLine, error: ErrorInfo) -> Answer:
    return Answer(refusal_line(line.custom_id, error, f"line_{number}"), is_failed=True)
