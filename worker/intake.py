"""Where jobs come in: the claim off the queues, and the checks that turn a claim into a job the engine can run.

A job that can never run becomes a job that has ended with the reason; it is committed like any other and harms nobody.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

import redis

from producer.contract import ErrorCode, ErrorInfo, JobRequest, Marker, Result
from worker.claim import Claim
from worker.errors import JobRefusedError
from worker.outlet.job_stream import JobStream
from worker.recovery import read_stored_output
from worker.rq_bridge import JobReader, timeout_seconds
from worker.running_job import RunningJob
from worker.scripts import Scripts
from worker.translate import Translator

_log = logging.getLogger(__name__)


class Intake:
    """One worker's way in. One thread."""

    def __init__(
        self,
        client: redis.Redis,
        scripts: Scripts,
        reader: JobReader,
        translator: Translator,
        *,
        queues: Sequence[str],
        worker: str,
        model: str,
        fingerprint: str,
        lease_seconds: float,
        tenant_limit: int | None = None,
        tenant_limits: Mapping[str, int] | None = None,
    ) -> None:
        """`tenant_limit`: jobs of a tenant that all workers together hold at most; `tenant_limits`: of some tenants."""
        self._client = client
        self._scripts = scripts
        self._reader = reader
        self._translator = translator
        self._queues = list(queues)
        self.worker = worker
        self._model = model
        self._fingerprint = fingerprint
        self._lease_seconds = lease_seconds
        self._tenant_limit = tenant_limit
        self._tenant_limits = dict(tenant_limits or {})
        self._request: tuple[str, int] | None = None  # a claim whose reply has not come yet
        self.is_suspended = False  # by `rq suspend`, as of the last claim

    def claim(self, max_jobs: int) -> list[Claim]:
        """Up to `max_jobs` jobs. Raises what Redis raises; the next call then asks for the same claim again."""
        if self._request is None:
            self._request = (uuid4().hex, max_jobs)
        request_id, max_jobs = self._request
        reply = self._scripts.claim(
            self._client,
            request_id=request_id,
            worker=self.worker,
            queues=self._queues,
            max_jobs=max_jobs,
            lease_seconds=self._lease_seconds,
            tenant_limit=self._tenant_limit,
            tenant_limits=self._tenant_limits,
        )
        self._request = None
        self.is_suspended = reply is None
        if reply is None:
            return []
        claims, dropped = reply
        for job_id, reason in dropped:
            _log.warning("action=job_dropped job_id=%s reason=%s", job_id.decode(errors="replace"), reason.decode())
        now = time.time()
        return [Claim.parse(claim, now) for claim in claims]

    def admit(self, claim: Claim) -> RunningJob:
        """The job, ready for the engine; or ended already, if it was refused or its output is complete.

        Raises what Redis raises, of a job whose stored output is to be read.
        """
        if claim.is_resumable and claim.done is not None:
            return self._finish_stored(claim)
        if claim.is_orphan:
            return self._finish_cancelled(claim)
        rq_job, problem = self._reader.restore(claim)
        try:
            if problem is not None:
                raise problem
            translated = self._translator.translate(claim.job_id, self._reader.read_kwargs(rq_job))
            _check_metadata(translated.request)
        except JobRefusedError as error:
            return self._refuse(claim, rq_job, error.info)
        except Exception as error:  # of any type: one job's content must not stop the worker
            _log.exception("action=intake_failed job_id=%s", claim.job_id)
            return self._refuse(claim, rq_job, ErrorInfo(code=ErrorCode.INTERNAL, message=f"intake failed: {error!r}"))
        stream = JobStream(
            claim.job_id,
            claim.attempt,
            publish=translated.request.stream,
            num_prompt_tokens=len(translated.prompt_token_ids),
            num_choices=translated.params.n,
        )
        model = translated.request.model or self._model
        return RunningJob(
            claim=claim,
            rq_job=rq_job,
            stream=stream,
            model=model,
            translated=translated,
            timeout_seconds=timeout_seconds(rq_job),
        )

    def build_marker(self, job: RunningJob) -> Marker:
        """The attempt's first entry. What earlier attempts showed is void, unless this one only ends the stream."""
        claim, translated = job.claim, job.translated
        return Marker(
            job_id=claim.job_id,
            attempt=claim.attempt,
            worker=self.worker,
            reset=claim.attempt > 1 and job.stored_choices is None,
            prompt_token_ids=translated.prompt_token_ids if translated else None,
            seed=translated.seed if translated else None,
            fingerprint=self._fingerprint if translated else None,
        )

    def _finish_stored(self, claim: Claim) -> RunningJob:
        """An earlier attempt wrote the done entry and died before its commit: it decided the outcome."""
        assert claim.done is not None
        rq_job, _ = self._reader.restore(claim)
        stored = read_stored_output(self._client, claim.job_id, cut_off="error")
        job = self._ended(claim, rq_job)
        job.stored_choices, job.stored_usage = stored.choices, claim.done.usage
        job.status, job.error = claim.done.status, claim.done.error
        return job

    def _finish_cancelled(self, claim: Claim) -> RunningJob:
        """Cancelled or deleted while nobody held it: it ends with what earlier attempts had put out."""
        rq_job, _ = self._reader.restore(claim)
        stored = read_stored_output(self._client, claim.job_id, cut_off="cancelled")
        job = self._ended(claim, rq_job)
        job.stored_choices, job.stored_usage = stored.choices, stored.usage
        job.stop_cause = "cancelled"
        return job

    def _refuse(self, claim: Claim, rq_job: object, error: ErrorInfo) -> RunningJob:
        _log.info("action=job_refused job_id=%s code=%s param=%s", claim.job_id, error.code, error.param)
        job = self._ended(claim, rq_job)
        # The message may quote what was sent, which may be no text that can be written down.
        job.error = error.model_copy(update={"message": _as_utf8(error.message), "param": _as_utf8(error.param)})
        return job

    def _ended(self, claim: Claim, rq_job: object) -> RunningJob:
        stream = JobStream(claim.job_id, claim.attempt, publish=True, num_choices=0)
        job = RunningJob(claim=claim, rq_job=rq_job, stream=stream, model=self._model)
        job.end()
        return job


def _check_metadata(request: JobRequest) -> None:
    """It comes back in the result as it is, so it must be something that JSON can hold."""
    if not request.metadata:
        return
    try:
        Result(job_id="", status="finished", metadata=request.metadata).to_wire()
    except Exception as error:  # pydantic's own, and what it lets through
        message = "metadata cannot be written as JSON (a lone surrogate, or nested too deeply?): send plain JSON values"
        raise JobRefusedError(ErrorCode.INVALID_REQUEST, message, param="metadata") from error


def _as_utf8(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()
