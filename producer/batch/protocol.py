"""Runs batch lines through the queues, with a bounded number of jobs in flight. Knows nothing about files.

A job's id is derived from the batch's id and the line's `custom_id`. An interrupted run leaves its jobs on the queues;
the next run of the same batch finds their results, or waits for them, and runs none twice.
"""

import hashlib
import json
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from producer.batch.line_index import Entry
from producer.batch.lines import ANSWER_ID, BadLineError, BatchLine, answer_line, bad_line, refusal_line
from producer.cancel import cancel
from producer.contract import ErrorCode, ErrorInfo, JobRequest, Usage
from producer.enqueue import MAX_JOBS_A_SEND, NewJob, build_job, check_size, enqueue
from producer.errors import InvalidJobError, JobNotFoundError
from producer.openai.request import COMPLETION_MAX_TOKENS, request_from_body
from producer.operations import Emit, Protocol, Sleep, send
from producer.outcome import Outcome, look_at
from producer.results import ResultCollector
from producer.rq_names import job_key, queue_key

MAX_IN_FLIGHT = 2000  # by default: enough to keep several workers busy, few enough to cancel quickly
MAX_RUNS_A_LINE = 10  # at most, of a line whose earlier job is lost but for its id
ROUND_SECONDS = 1.0  # at most, between two emitted lists of answers

_JOB_ID = "batch-"  # + a hash of the batch, the line and the run

FindQueue = Callable[[JobRequest], Protocol[str]]
"""The queue for a line's job. Raises InvalidJobError for one that has none."""


class LineSource(typing.Protocol):
    """The lines without an answer, each once. Bodies are not kept; a line that is needed again is read again."""

    def __iter__(self) -> Iterator[Entry]:
        """Yield each line's number in the input, from 1, and the line or its error."""
        ...

    def reload(self, number: int) -> BatchLine:
        """Read a well-formed line again."""
        ...


@dataclass(frozen=True, slots=True)
class QueueLimit:
    """No job is added to the queue while it has this many."""

    queue: str
    max_depth: int


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """`run_id` separates runs of one file: under another one every line is run again. `model` and `tenant` replace the
    lines' own. `completion_max_tokens`: the default for completions.

    `runs_failed_anew`: a failed job of an earlier run is not an answer; its line is run again. `max_request_bytes`:
    larger requests are refused before they are enqueued.
    """

    max_in_flight: int = MAX_IN_FLIGHT
    run_id: str = ""
    model: str | None = None
    tenant: str | None = None
    completion_max_tokens: int | None = COMPLETION_MAX_TOKENS
    priority_class: str | None = None
    runs_failed_anew: bool = True
    queue_limit: QueueLimit | None = None
    max_request_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of output, for input line `number`."""

    number: int
    line: dict[str, Any]
    is_failed: bool
    usage: Usage = field(default_factory=Usage)

    @property
    def problem(self) -> str | None:
        """For a failed line, its custom_id and the reason."""
        if not self.is_failed:
            return None
        error = self.line["error"] or self.line["response"]["body"]["error"]
        return f"{self.line['custom_id'] or f'line {self.number}'}: {error['message']}"


@dataclass(frozen=True, slots=True)
class _Item:
    number: int
    line: BatchLine  # without its body once its job is enqueued
    run: int  # how often the line was given a job before
    is_new: bool = False  # whether this run enqueued it


class BatchProtocol:
    """Turns lines into answers, with at most `max_in_flight` jobs on the queues at a time."""

    def __init__(self, lines: LineSource, find_queue: FindQueue, *, batch_id: str, options: BatchOptions) -> None:
        self._lines = lines
        self._entries = iter(lines)
        self._find_queue = find_queue
        self._batch_id = batch_id
        self._options = options
        self._collector = ResultCollector({}, timeout=None)
        self._in_flight: dict[str, _Item] = {}
        self._is_exhausted = False

    def run(self) -> Protocol[None]:
        """Emit lists of `Answer`s in the order in which jobs end; an empty list when none ended for a while."""
        while True:
            yield from self._fill()
            if self._in_flight:
                yield from self._collect()
            elif self._is_exhausted:
                return
            else:  # the queue is full of others' jobs
                yield Sleep(ROUND_SECONDS)
                yield Emit([])

    def _collect(self) -> Protocol[None]:
        answers: list[Answer] = []
        again: list[_Item] = []
        for outcome in (yield from self._collector.next_ended(within=ROUND_SECONDS)):
            item = self._in_flight.pop(outcome.job_id)
            if self._is_stale(item, outcome):
                again.append(replace(item, line=self._lines.reload(item.number), run=item.run + 1))
            else:
                answers.append(answer_to(item.number, item.line, outcome))
        yield Emit(answers)
        yield from self._enqueue((yield from self._check_all(again)))

    def _is_stale(self, item: _Item, outcome: Outcome) -> bool:
        """Whether the line is to be run again: its job was lost, as in a fail-over, or is an earlier run's that failed
        and was not reported."""
        if isinstance(outcome, JobNotFoundError):
            # If a new job's result cannot be found, that of another job could not be either.
            return item.run < MAX_RUNS_A_LINE and not (item.is_new and outcome.has_ended)
        return not item.is_new and self._options.runs_failed_anew and outcome.status != "finished"

    def _fill(self) -> Protocol[None]:
        """Enqueue more jobs, in slices: one round trip for many jobs, and none for only one or two."""
        slice_size = max(1, min(MAX_JOBS_A_SEND, self._options.max_in_flight // 8))
        while not self._is_exhausted and self._options.max_in_flight - len(self._in_flight) >= slice_size:
            if not (yield from self._has_room(slice_size)):
                return
            yield from self._enqueue((yield from self._check_all(self._take(slice_size))))
            yield Emit([])  # so that the caller regains control

    def _has_room(self, num_jobs: int) -> Protocol[bool]:
        limit = self._options.queue_limit
        if limit is None:
            return True
        [depth] = yield from send(("LLEN", queue_key(limit.queue)))
        return bool(depth == 0 or depth + num_jobs <= limit.max_depth)

    def _take(self, num_items: int) -> Iterator[_Item | Answer]:
        """The next `num_items` lines, or those that are left; a malformed line is an answer already."""
        for _ in range(num_items):
            entry = next(self._entries, None)
            if entry is None:
                self._is_exhausted = True
                return
            number, line = entry
            if isinstance(line, BadLineError):
                yield Answer(number, bad_line(line, number=number), is_failed=True)
            else:
                yield _Item(number, line, run=0)

    def _check_all(self, items: Iterable[_Item | Answer]) -> Protocol[list[tuple[_Item, NewJob]]]:
        """The jobs to enqueue; the answers to refused lines are emitted."""
        checked: list[tuple[_Item, NewJob]] = []
        refused: list[Answer] = []
        for item in items:
            if isinstance(item, Answer):
                refused.append(item)
                continue
            try:
                checked.append((replace(item, line=item.line.without_body()), (yield from self._check(item))))
            except InvalidJobError as error:
                refused.append(_refusal(item.number, item.line, error.info))
        if refused:
            yield Emit(refused)
        return checked

    def _check(self, item: _Item) -> Protocol[NewJob]:
        line, options = item.line, self._options
        replaced = {name: value for name, value in (("model", options.model), ("tenant", options.tenant)) if value}
        body = {**line.body, **replaced}
        request = request_from_body(line.url, body, completion_max_tokens=options.completion_max_tokens)
        queue = yield from self._find_queue(request)
        job = build_job(request, queue, batch_job_id(self._batch_id, line.custom_id, item.run))
        if options.max_request_bytes is not None and request.task == "generate":
            check_size(request, len(job.arguments), options.max_request_bytes)
        return job

    def _enqueue(self, checked: list[tuple[_Item, NewJob]]) -> Protocol[None]:
        if not checked:
            return
        enqueued = yield from enqueue([job for _, job in checked])
        for (item, _), job in zip(checked, enqueued, strict=True):
            self._in_flight[job.job_id] = replace(item, is_new=job.is_new)
        may_have_ended = not all(job.is_new for job in enqueued)
        self._collector.add({job.job_id: job.queue for job in enqueued}, may_have_ended=may_have_ended)


def batch_job_id(batch_id: str, custom_id: str, run: int = 0) -> str:
    """The id of a line's job. `run`: how many jobs the line had before."""
    identity = json.dumps([batch_id, custom_id])
    job_id = f"{_JOB_ID}{hashlib.sha256(identity.encode()).hexdigest()[:40]}"
    return f"{job_id}-{run}" if run else job_id


def is_of_another_batch(answer_id: object, batch_id: str, custom_id: str) -> bool:
    """Whether an output line's id names a job of another batch. Ids of refusals name no job."""
    if not isinstance(answer_id, str) or not answer_id.startswith(f"{ANSWER_ID}{_JOB_ID}"):
        return False
    job_id = batch_job_id(batch_id, custom_id)
    return answer_id.removeprefix(ANSWER_ID)[: len(job_id)] != job_id


def batch_job_ids(batch_id: str, custom_id: str) -> Iterator[str]:
    """Every id that a line's jobs can have if failed ones are not run again; usually there is only one."""
    return (batch_job_id(batch_id, custom_id, run) for run in range(MAX_RUNS_A_LINE + 1))


def cancel_jobs(lines: Iterable[Entry], batch_id: str) -> Protocol[int]:
    """Cancel the jobs of these lines that earlier runs left, and return how many there were."""
    num_cancelled = 0
    entries = iter(lines)
    while some := list(islice(entries, MAX_JOBS_A_SEND)):
        jobs = [list(batch_job_ids(batch_id, line.custom_id)) for _, line in some if isinstance(line, BatchLine)]
        num_known = yield from send(*(("EXISTS", *map(job_key, ids)) for ids in jobs))
        known = [job_id for ids, number in zip(jobs, num_known, strict=True) if number for job_id in ids]
        for look in (yield from look_at(known)):
            if look.status is not None and not look.status.has_ended:
                with suppress(JobNotFoundError):  # it has expired meanwhile
                    num_cancelled += yield from cancel(look.job_id)
    return num_cancelled


def answer_to(number: int, line: BatchLine, outcome: Outcome) -> Answer:
    """The answer to a line, from its job's outcome."""
    if isinstance(outcome, JobNotFoundError):
        return _refusal(number, line, ErrorInfo(code=ErrorCode.JOB_NOT_FOUND, message=str(outcome)))
    body = answer_line(line, outcome, created=int(time.time()))
    return Answer(number, body, outcome.status != "finished", outcome.usage)


def _refusal(number: int, line: BatchLine, error: ErrorInfo) -> Answer:
    return Answer(number, refusal_line(line.custom_id, error, f"line_{number}"), is_failed=True)
