"""Uploads full results to the result store, beside the loop. A store that is down delays a job, but not for ever."""

import logging
import time
from collections.abc import Callable

from producer.contract import ErrorCode, ErrorInfo, Result
from worker.background import BackgroundThreads
from worker.errors import ResultStoreError
from worker.outlet.base import ResultStore
from worker.running_job import RunningJob, Stage

NUM_THREADS = 16
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
DOWN_SECONDS = 30.0  # after giving up once, for which further jobs get one try each

_log = logging.getLogger(__name__)


class Uploads:
    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._threads = BackgroundThreads(NUM_THREADS, "upload")
        self._down_until = 0.0

    def put(self, job: RunningJob, on_stored: Callable[[], None]) -> None:
        """Store `job.result`, replace it with what Redis is to keep, and call `on_stored` on another thread.

        If the store stays down, Redis keeps the whole result, whose `error` says so; its status is unchanged.
        """
        self._threads.submit(lambda: self._put(job, on_stored, None))

    def _put(self, job: RunningJob, on_stored: Callable[[], None], waits: tuple[float, ...] | None) -> None:
        """`waits`: the seconds before each remaining try; None at the first."""
        assert job.result is not None
        if job.stage is not Stage.STORING:
            return  # another attempt has the job and stores its own result
        if waits is None:
            waits = () if time.monotonic() < self._down_until else RETRY_SECONDS
        try:
            job.result = self._store.put(job.result, job.object_attempt or job.claim.attempt)
        except Exception as error:  # of any type: a job whose result cannot be stored must still end
            is_unknown = not isinstance(error, ResultStoreError)
            _log.warning("action=store_failed job_id=%s error=%s", job.job_id, error, exc_info=is_unknown)
            if waits:
                self._threads.submit(lambda: self._put(job, on_stored, waits[1:]), after_seconds=waits[0])
                return
            self._down_until = time.monotonic() + DOWN_SECONDS
            _log.error("action=store_given_up job_id=%s reason=its result stays in Redis", job.job_id)
            job.result = _not_stored(job.result)
        on_stored()


def _not_stored(result: Result) -> Result:
    if result.error is not None:
        return result
    message = "the result store could not be written: Redis keeps the whole result, for as long as any other"
    return result.model_copy(update={"error": ErrorInfo(code=ErrorCode.RESULT_STORE_ERROR, message=message)})
