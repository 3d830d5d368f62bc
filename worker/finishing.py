"""A job's way from its last output to its commit: outcome, result store, done entry, commit.

Nearly all jobs simply finish. For these the done entry and the commit are one script, which does nothing if RQ has
cancelled the job or if other jobs wait for it. In these cases, and if there is more to do (an upload, a callback), the
steps run one after the other.

The done entry decides the outcome: a cancel or a crash after it changes nothing. Used from the loop's thread; uploads
and commits run on other threads.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from producer.contract import ErrorCode, ErrorInfo
from producer.rq_names import job_key
from worker.claim import is_replaced, read_standing
from worker.commit import MAX_BATCH, Committer
from worker.job_parts import JobParts
from worker.rq_bridge import will_retry
from worker.running_job import RunningJob, Stage
from worker.uploads import Uploads

_log = logging.getLogger(__name__)


class Finisher:
    """`post` runs a callable on the loop's thread. There `on_lost` is called for a job that is another attempt's, and
    `on_end` for one whose commit was not left to the `committer`."""

    def __init__(
        self,
        parts: JobParts,
        committer: Committer,
        *,
        post: Callable[[Callable[[], None]], None],
        on_lost: Callable[[RunningJob], None],
        on_end: Callable[[RunningJob], None],
    ) -> None:
        self._client = parts.client
        self._outlet = parts.outlet
        self._intake = parts.intake
        self._uploads = None if parts.store is None else Uploads(parts.store)
        self._committer = committer
        self._post = post
        self._on_lost = on_lost
        self._on_end = on_end
        self._ended: list[RunningJob] = []
        self._sealed: list[RunningJob] = []

    def add(self, job: RunningJob) -> None:
        """The job has ended."""
        self._ended.append(job)

    @property
    def has_work(self) -> bool:
        """Whether jobs wait for `decide`."""
        return bool(self._ended)

    @property
    def has_sealed(self) -> bool:
        """Whether jobs wait for a flush and `commit_stored`."""
        return bool(self._sealed)

    def forget(self, job: RunningJob) -> None:
        """The job is not ours any more."""
        self._ended = [other for other in self._ended if other is not job]
        self._sealed = [other for other in self._sealed if other is not job]

    def decide(self) -> None:
        """Settle the outcome of jobs that have ended, in the light of what RQ says now. Raises what Redis raises."""
        self._ended = [job for job in self._ended if not self._finish_at_once(job)]
        while batch := self._ended[:MAX_BATCH]:
            with self._client.pipeline(transaction=False) as pipe:
                fences, records, _ = read_standing(pipe, [job.job_id for job in batch])
            del self._ended[: len(batch)]
            for job, fence, rq_says in zip(batch, fences, records, strict=True):
                try:
                    self._decide(job, fence, rq_says)
                except Exception as error:  # of any type: one job's outcome must not stop the worker
                    _log.exception("action=outcome_failed job_id=%s", job.job_id)
                    self.fail_unwritable(job, repr(error))

    def commit_stored(self) -> None:
        """Commit the jobs whose streams are stored to their ends."""
        sealed, self._sealed = self._sealed, []
        ready: list[RunningJob] = []
        for job in sealed:
            if job.stream.is_committed:
                self._note_end(job)
            elif job.stream.is_stored:
                ready.append(job)
            elif job.stream.is_sealed:
                self._sealed.append(job)
            else:
                job.reopen()
                self._ended.append(job)
        if ready:
            self._commit(ready)

    def fail_unwritable(self, job: RunningJob, reason: str) -> None:
        """The job's stream takes nothing: every attempt would meet that, so it ends here, with a result alone."""
        self.forget(job)
        job.end()
        job.error = ErrorInfo(code=ErrorCode.INTERNAL, message=f"the job's stream cannot be written: {reason}")
        job.decide("failed")
        job.result = job.build_result()
        self._commit_one(job)

    def _finish_at_once(self, job: RunningJob) -> bool:
        """Whether it goes all of its way with the next flush. There RQ can still contest it."""
        if job.stop_cause or job.error or job.status or job.is_contested or self._uploads or job.translated is None:
            return False
        job.decide("finished")
        try:
            job.result = job.build_result()
            if (commit := self._committer.build(job)) is not None:
                job.stream.seal(job.build_done(), commit, record_key=job_key(job.job_id))
        except Exception:  # of any type: one step after the other, it is seen which one it is
            commit = None
        if commit is None:
            job.reopen()
            return False
        self._sealed.append(job)
        return True

    def _note_end(self, job: RunningJob) -> None:
        job.stage = Stage.COMMITTING
        if job.rq_job.webhooks:
            self._committer.on_webhooks()
        self._on_end(job)

    def _decide(self, job: RunningJob, fence: bytes | None, rq_says: list[bytes | None] | Exception) -> None:
        """`rq_says`: the RECORD_FIELDS; an error where its key is no hash any more."""
        if fence != job.claim.fence.encode() or is_replaced(rq_says):
            self._on_lost(job)
            return
        if job.status is not None:  # an earlier attempt's done entry decided it
            job.result = job.build_result()
            self._store(job, then=self._commit_one)
            return
        if isinstance(rq_says, Exception) or rq_says[0] in (None, b"canceled"):
            job.stop_cause = "cancelled"
        _settle(job)
        if job.is_retried:
            self._outlet.forget(job.stream)
            self._commit_one(job)
            return
        if job.stored is not None and job.stored.status == job.status:
            job.result = job.stored
            self._seal(job)
            return
        job.result = job.build_result()
        self._store(job, then=self._seal if self._uploads is None else self._look_again)

    def _store(self, job: RunningJob, then: Callable[[RunningJob], None]) -> None:
        job.stage = Stage.STORING

        def go_on() -> None:
            if job.stage is Stage.STORING:  # not lost meanwhile
                then(job)

        if self._uploads is None:
            go_on()
        else:
            self._uploads.put(job, lambda: self._post(go_on))

    def _look_again(self, job: RunningJob) -> None:
        """An upload may take long, and a cancel that came meanwhile has been promised: the outcome is settled anew."""
        job.note_stored()
        self._ended.append(job)

    def _seal(self, job: RunningJob) -> None:
        """The done entry goes out with the next flush; with it the commit, where that can still be contested."""
        if job.translated is None and not job.is_contested:  # it never ran: its stream begins here
            self._outlet.open(job.stream, self._intake.build_marker(job), fence=job.claim.fence)
        may_be_contested = job.status == "finished" and not job.is_contested and job.translated is not None
        commit = self._committer.build(job) if may_be_contested else None
        # Whoever cancels the job before its done entry is told that it ends as cancelled.
        record_key = None if job.status == "cancelled" else job_key(job.job_id)
        job.stream.seal(job.build_done(), commit, record_key=record_key)
        job.stage = Stage.SEALED
        self._sealed.append(job)

    def _commit_one(self, job: RunningJob) -> None:
        self._commit([job])

    def _commit(self, jobs: list[RunningJob]) -> None:
        for job in jobs:
            job.stage = Stage.COMMITTING
        self._committer.commit(jobs)


def _settle(job: RunningJob) -> None:
    """The outcome of a job that has ended: a cancel outweighs everything, a deadline an error, an error the output."""
    if job.stop_cause == "cancelled":
        job.error = None
        job.decide("cancelled")
    elif job.stop_cause == "stopped":
        job.error = ErrorInfo(code=ErrorCode.CANCELLED, message="the job was stopped by RQ's stop-job command")
        job.decide("stopped")
    elif job.stop_cause == "deadline" and job.stream.num_output_tokens:
        job.error = None
        job.decide("finished", cut_off="deadline")
    elif job.stop_cause == "deadline":
        what = "its embeddings were computed" if job.vectors is not None else "it had put out a token"
        assert job.deadline is not None
        was = datetime.fromtimestamp(job.deadline, UTC).isoformat(timespec="seconds")
        message = f"the job's deadline passed before {what}; it was {was}"
        job.error = ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED, message=message, param="deadline")
        job.decide("failed")
    elif job.error is not None:
        job.is_retried = will_retry(job.rq_job) and job.error.code is not ErrorCode.POISON
        job.decide("failed")
    else:
        job.decide("finished")
