"""What becomes of a batch's lines that have no answer when it is cancelled, or its time is up.

Nobody knows which of them are on a queue: whoever put them there may be dead. But a line's job id follows from the
line, so each is looked for. One that has ended by itself is answered as ever; the others are cancelled.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from producer.batch_lines import BadLineError, BatchLine, bad_line, unanswered_line
from producer.batch_protocol import Answer, answer_to, batch_job_id
from producer.cancel import cancel
from producer.contract import Result
from producer.errors import JobNotFoundError
from producer.line_index import Entry
from producer.operations import Emit, Protocol, send
from producer.outcome import NUM_LOOK_COMMANDS, Look, look_commands, parse_look, read_result

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
            looks = yield from self._look_at(line for _, line in lines)
            for (number, line), look in zip(lines, looks, strict=True):
                result = yield from self._result(look)
                is_answered = result is not None and result.status not in STOPPED
                answers.append(answer_to(number, line, result) if is_answered and result else self._none(number, line))
            yield Emit(answers)

    def _look_at(self, lines: Iterable[BatchLine]) -> Protocol[list[Look]]:
        ids = [batch_job_id(self.batch_id, line.custom_id) for line in lines]
        if not ids:
            return []
        replies = yield from send(*(command for job_id in ids for command in look_commands(job_id)))
        each = [replies[at : at + NUM_LOOK_COMMANDS] for at in range(0, len(replies), NUM_LOOK_COMMANDS)]
        return [parse_look(job_id, some) for job_id, some in zip(ids, each, strict=True)]

    def _result(self, look: Look) -> Protocol[Result | None]:
        """Of a job that ended by itself; any other is cancelled, wherever it is."""
        if look.status is None and not look.has_result:
            return None  # never enqueued
        if look.status is not None and not look.status.has_ended:
            try:
                if (yield from cancel(look.job_id)):
                    return None
            except JobNotFoundError:
                return None
        return (yield from read_result(look.job_id))

    def _none(self, number: int, line: BatchLine) -> Answer:
        request_id = batch_job_id(self.batch_id, line.custom_id)
        body = unanswered_line(line.custom_id, code=self.code, message=self.message, request_id=request_id)
        return Answer(number, body, is_failed=True)
