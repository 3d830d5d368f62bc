"""Takes jobs in: claims them from the queues, and checks and turns each claim into a job that the engine can run.

A job that can never run becomes one that has ended with the reason, and is committed like any other.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import redis
from pydantic import ValidationError

from producer.contract import Done, ErrorCode, ErrorInfo, JobRequest, Marker
from producer.contract.packed_field import unpacks_to_more
from worker.claim import Claim
from worker.errors import JobRefusedError
from worker.job_vectors import JobVectors
from worker.outlet.job_stream import JobStream
from worker.outlet.stored_stream import StoredStream
from worker.recovery import read_ahead, read_stored
from worker.rq_bridge import JobReader, timeout_seconds
from worker.running_job import RunningJob
from worker.scripts import Scripts
from worker.translate import TranslatedJob, Translator

MAX_READ_AHEAD = 256  # streams
LONG_REQUEST_BYTES = 16 << 10  # of JSON: 3 to 10 ms of tokenising

_log = logging.getLogger(__name__)


class Intake:
    """One worker's intake. Used from one thread, except `admit`, which is thread-safe."""

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
        """`tenant_limit`: how many jobs of a tenant all workers together may run; `tenant_limits`: the same, by
        tenant."""
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
        self._request_id: str | None = None  # of a claim without a reply so far
        self._read: dict[str, Any] = {}  # by fence, the rows of streams whose jobs are admitted next
        self.is_suspended = False  # by `rq suspend`, at the last claim

    def claim(self, max_jobs: int, *, tenant_queues: Sequence[str] = ()) -> list[Claim]:
        """Claim up to `max_jobs` jobs. Raises Redis's errors; the next call then repeats the same claim and returns its
        jobs.

        `tenant_queues`: tenants' queues that may have jobs and do not take turns yet.
        """
        self._request_id = self._request_id or uuid4().hex
        reply = self._scripts.claim(
            self._client,
            request_id=self._request_id,
            worker=self.worker,
            queues=self._queues,
            tenant_queues=tenant_queues,
            max_jobs=max_jobs,
            lease_seconds=self._lease_seconds,
            tenant_limit=self._tenant_limit,
            tenant_limits=self._tenant_limits,
        )
        self._request_id = None
        self.is_suspended = reply is None
        if reply is None:
            return []
        claims, dropped = reply
        for job_id, reason in dropped:
            _log.warning("action=job_dropped job_id=%s reason=%s", job_id.decode(errors="replace"), reason.decode())
        now = time.time()
        claimed = [Claim.parse(claim, now) for claim in claims]
        self._read_ahead(claimed)
        return claimed

    def recall(self) -> list[Claim]:
        """The jobs of the last claim if its reply was lost, else none. Raises Redis's errors."""
        return self.claim(0) if self._request_id is not None else []

    def _read_ahead(self, claims: Sequence[Claim]) -> None:
        """Read the streams of many claims at once: hundreds of handed-over jobs must not wait for a round trip each."""
        self._read |= read_ahead(self._client, claims)
        for fence in list(self._read)[:-MAX_READ_AHEAD]:
            self._read.pop(fence, None)  # `admit` may have taken it

    def is_long(self, claim: Claim) -> bool:
        """Whether `admit` would take so long that it would delay other jobs' tokens."""
        return unpacks_to_more(claim.fields.get(b"data", b""), LONG_REQUEST_BYTES)

    def admit(self, claim: Claim) -> RunningJob:
        """The job, ready for the engine; or already ended, if it was refused or its output is complete.

        Raises Redis's errors if the job's stored output cannot be read.
        """
        stored = self._read_stored(claim) if claim.is_resumable else None
        rq_job, problem = self._reader.restore(claim)
        if stored is not None and stored.done is not None:
            if not self._is_lost(rq_job, stored.done):
                return self._finish_stored(claim, rq_job, stored, stored.done)
            stored = None
        if claim.is_orphan:
            return self._finish_cancelled(claim, rq_job, stored)
        if claim.is_poison:
            return self._finish_poison(claim, rq_job, stored)
        try:
            if problem is not None:
                raise problem
            kwargs = self._reader.read_kwargs(rq_job)
            begun = self._resumable(claim, stored, kwargs) if stored is not None else None
            translated = self._translator.translate(claim.job_id, kwargs, begun.start if begun else None)
            return self._ready(claim, rq_job, translated, stored=stored, begun=begun)
        except JobRefusedError as error:
            return self._refuse(claim, rq_job, error.info)
        except Exception as error:  # of any type: one job's content must not stop the worker
            _log.exception("action=intake_failed job_id=%s", claim.job_id)
            return self._refuse(claim, rq_job, ErrorInfo(code=ErrorCode.INTERNAL, message=f"intake failed: {error!r}"))

    def _read_stored(self, claim: Claim) -> StoredStream:
        """Read the job's stream. The claim's fence keeps earlier attempts from adding to it."""
        rows = self._read.pop(claim.fence, None)
        return StoredStream(rows) if rows is not None else read_stored(self._client, claim.job_id)

    def _ready(
        self,
        claim: Claim,
        rq_job: Any,
        translated: TranslatedJob,
        *,
        stored: StoredStream | None,
        begun: StoredStream | None,
    ) -> RunningJob:
        stream = JobStream(
            claim.job_id,
            claim.attempt,
            publish=translated.request.stream,
            num_prompt_tokens=translated.num_prompt_tokens,
            num_choices=translated.request.num_choices,
            stored=begun,
            writer=self._translator.writer,
            prompt=translated.echo,
        )
        return RunningJob(
            claim=claim,
            rq_job=rq_job,
            stream=stream,
            model=translated.request.model or self._model,
            translated=translated,
            vectors=JobVectors(len(translated.to_embed)) if translated.to_embed else None,
            # A job that embeds puts out nothing before its end.
            resets=begun is None and _has_shown(claim, stored) and not (translated.to_embed and stored is not None),
            metadata=translated.request.metadata,
            timeout_seconds=timeout_seconds(rq_job),
        )

    def give_up(self, claim: Claim, reason: str) -> RunningJob:
        """The job, ended as failed, because `admit` keeps raising for it."""
        rq_job, _ = self._reader.restore(claim)
        if claim.is_orphan:
            return self._finish_cancelled(claim, rq_job, None)
        message = f"what the job has put out so far cannot be read: {reason}"
        return self._refuse(claim, rq_job, ErrorInfo(code=ErrorCode.INTERNAL, message=message))

    def build_marker(self, job: RunningJob) -> Marker:
        """The attempt's first entry. That of a first attempt, or of one that starts over, also holds what a resume
        needs."""
        claim, translated = job.claim, job.translated
        # Every attempt at vectors starts over.
        is_first = translated is not None and not job.stream.is_resumed and not translated.to_embed
        return Marker(
            job_id=claim.job_id,
            attempt=claim.attempt,
            worker=self.worker,
            reset=job.resets,
            prompt_token_ids=translated.prompt_token_ids if translated and is_first else None,
            seed=translated.seed if translated and is_first else None,
            fingerprint=self._fingerprint if translated else None,
        )

    def _resumable(self, claim: Claim, stored: StoredStream, kwargs: dict[str, Any]) -> StoredStream | None:
        """The stored output that the attempt resumes from; None if it starts at the beginning."""
        if not stored.entries or kwargs.get("task") == "embed":  # streams hold no vectors
            return None
        num_choices = kwargs.get("n", 1)
        why = stored.why_not_resumable(self._fingerprint, num_choices if isinstance(num_choices, int) else 1)
        if why is not None:
            _log.warning("action=job_starts_over job_id=%s attempt=%d reason=%s", claim.job_id, claim.attempt, why)
            return None
        num_tokens = stored.num_output_tokens
        _log.info("action=job_resumed job_id=%s attempt=%d num_tokens=%d", claim.job_id, claim.attempt, num_tokens)
        return stored

    def _is_lost(self, rq_job: Any, done: Done) -> bool:
        """Whether a job's outcome was decided but its result was lost with the attempt: it is computed again, with the
        same result."""
        request = self._read_request(rq_job) if done.status == "finished" else None
        return request is not None and request.task == "embed"

    def _finish_stored(self, claim: Claim, rq_job: Any, stored: StoredStream, done: Done) -> RunningJob:
        """An earlier attempt wrote the done entry and died before its commit: it decided the outcome."""
        job = self._ended(claim, rq_job, stored)
        job.decide(done.status)
        job.error, job.object_attempt = done.error, stored.done_attempt
        return job

    def _finish_poison(self, claim: Claim, rq_job: Any, stored: StoredStream | None) -> RunningJob:
        """End a job that would crash the next worker as well. Its partial output is kept."""
        _log.error("action=job_poison job_id=%s num_crashes=%d", claim.job_id, claim.num_all_crashes)
        job = self._ended(claim, rq_job, stored)
        message = (
            f"{claim.num_all_crashes} workers died while they ran this job, the last {claim.num_crashes} without a new "
            "token: it is not tried again"
        )
        job.error = ErrorInfo(code=ErrorCode.POISON, message=message)
        return job

    def _finish_cancelled(self, claim: Claim, rq_job: Any, stored: StoredStream | None) -> RunningJob:
        """End a job that was cancelled or deleted while no worker held it, with the output of earlier attempts."""
        job = self._ended(claim, rq_job, stored)
        job.stop_cause = "cancelled"
        return job

    def _refuse(self, claim: Claim, rq_job: Any, error: ErrorInfo) -> RunningJob:
        _log.info("action=job_refused job_id=%s code=%s param=%s", claim.job_id, error.code, error.param)
        job = self._ended(claim, rq_job, None)
        # The message may quote the request, which may not be valid Unicode.
        job.error = error.model_copy(update={"message": _as_utf8(error.message), "param": _as_utf8(error.param)})
        return job

    def _ended(self, claim: Claim, rq_job: Any, stored: StoredStream | None) -> RunningJob:
        """A job that ends without the engine, with the output that it has."""
        request = self._read_request(rq_job) if stored is not None else None
        stream = JobStream(
            claim.job_id,
            claim.attempt,
            publish=True,
            num_prompt_tokens=stored.num_prompt_tokens if stored else 0,
            num_choices=max(stored.num_choices, request.num_choices if request else 0) if stored else 0,
            stored=stored,
        )
        job = RunningJob(
            claim=claim,
            rq_job=rq_job,
            stream=stream,
            model=(request and request.model) or self._model,
            resets=stored is None and claim.attempt > 1,
            metadata=request.metadata if request else {},
        )
        job.end()
        return job

    def _read_request(self, rq_job: Any) -> JobRequest | None:
        """None where it cannot be read, which costs an ended job no more than its metadata."""
        try:
            return JobRequest.model_validate(self._reader.read_kwargs(rq_job))
        except (JobRefusedError, ValidationError):
            return None


def _has_shown(claim: Claim, stored: StoredStream | None) -> bool:
    """Whether subscribers may have seen output of earlier attempts."""
    return claim.attempt > 1 and (stored is None or bool(stored.entries))


def _as_utf8(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()
