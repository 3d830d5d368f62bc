"""Settles the lines that have no answer when their batch is cancelled, or its time is over.

It is not known which of them are on a queue: the process that enqueued them may be dead. But the ids of a line's jobs
follow from the line, so each id is looked up. A job that has ended by itself answers its line; the others are
cancelled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeGuard

from producer.batch.line_index import Entry
from producer.batch.lines import BadLineError, BatchLine, bad_line, unanswered_line
from producer.batch.protocol import Answer, answer_to, batch_job_id, batch_job_ids
from producer.cancel import cancel
from producer.contract import Result, keys
from producer.errors import JobNotFoundError
from producer.operations import Emit, Protocol, send
from producer.outcome import Look, Outcome, look_at, read_results
from producer.rq_names import job_key

LINES_AT_ONCE = 200
STOPPED = ("cancelled", "stopped")


@dataclass(frozen=True, slots=True)
class Leftovers:
    """`code` and `message`: the error of a line that is not answered any more."""

    batch_id: str
    code: str
    message: str

    def settle(self, entries: Iterator[Entry]) -> Protocol[None]:
        """Emit a list of answers at a time, until each entry has one."""
        while some := list(islice(entries, LINES_AT_ONCE)):
            answers = [
                Answer(number, bad_line(line, number=number), is_failed=True)
                for number, line in some
                if isinstance(line, BadLineError)
            ]
            lines = [(number, line) for number, line in some if isinstance(line, BatchLine)]
            results = yield from self._results([line for _, line in lines])
            for (number, line), result in zip(lines, results, strict=True):
                answers.append(answer_to(number, line, result) if result is not None else self._none(number, line))
            yield Emit(answers)

    def _results(self, lines: Sequence[BatchLine]) -> Protocol[list[Result | None]]:
        """For each line, the result of a job that ended by itself; the line's other jobs are cancelled."""
        if not lines:
            return []
        jobs = [list(batch_job_ids(self.batch_id, line.custom_id)) for line in lines]
        num_known = yield from send(*(("EXISTS", *map(job_key, ids), *map(keys.result_key, ids)) for ids in jobs))
        known = [job_id for ids, number in zip(jobs, num_known, strict=True) if number for job_id in ids]
        ended = yield from self._stop((yield from look_at(known)))
        results = dict(zip(ended, (yield from read_results(ended)), strict=True))
        return [next((result for result in map(results.get, ids) if _is_answer(result)), None) for ids in jobs]

    def _stop(self, looks: Sequence[Look]) -> Protocol[list[str]]:
        """Cancel the jobs that have not ended; returns those that had."""
        ended: list[str] = []
        for look in looks:
            if look.status is None and not look.has_result:
                continue  # never enqueued, or forgotten
            try:
                if look.status is None or look.status.has_ended or not (yield from cancel(look.job_id)):
                    ended.append(look.job_id)
            except JobNotFoundError:
                continue
        return ended

    def _none(self, number: int, line: BatchLine) -> Answer:
        request_id = batch_job_id(self.batch_id, line.custom_id)
        body = unanswered_line(line.custom_id, code=self.code, message=self.message, request_id=request_id)
        return Answer(number, body, is_failed=True)


def _is_answer(outcome: Outcome | None) -> TypeGuard[Result]:
    return isinstance(outcome, Result) and outcome.status not in STOPPED
