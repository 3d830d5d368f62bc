"""The common part of the blocking and the asyncio client: settings, and the protocols of a submission."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from producer.contract import JobRequest, Message
from producer.enqueue import Destination, NewJob, build_request, enqueue, prepare, prepare_many
from producer.errors import InvalidJobError
from producer.job import AsyncJob, Job
from producer.operations import Protocol
from producer.settings import ProducerSettings, load_settings
from producer.subscription import LookPace
from producer.workers import ModelDirectory

Prompt = str | list[int] | None  # text or token ids
Messages = Sequence[Mapping[str, Any] | Message] | None
Requests = Iterable[Mapping[str, Any] | JobRequest]


class BaseClient:
    """Settings, checks and protocols; the subclasses run the protocols."""

    def __init__(
        self, redis_url: str | None = None, *, queue: str | None = None, s3_endpoint_url: str | None = None
    ) -> None:
        """Arguments that are not given are taken from PROMPTMILL_REDIS_URL, PROMPTMILL_QUEUE and
        PROMPTMILL_S3_ENDPOINT_URL, else from the defaults of `ProducerSettings`. Raises SettingsError."""
        flags = {"redis_url": redis_url, "queue": queue, "s3_endpoint_url": s3_endpoint_url}
        self.settings = load_settings(ProducerSettings, flags)
        self._directory = ModelDirectory()
        self._look_pace = LookPace()

    def _submit_one(
        self,
        fields: Mapping[str, Any],
        *,
        queue: str | None,
        priority_class: str | None,
        job_id: str | None,
        depends_on: Sequence[str],
        durable: bool,
    ) -> Protocol[NewJob]:
        destination = Destination.choose(self.settings.queue, queue, priority_class)
        job = yield from prepare(build_request(fields), destination, self._directory, job_id, depends_on)
        [enqueued] = yield from enqueue([job], is_durable=durable)
        return enqueued

    def _submit_many(
        self,
        requests: Requests,
        *,
        queue: str | None,
        priority_class: str | None,
        job_ids: Sequence[str] | None,
        durable: bool,
    ) -> Protocol[list[NewJob]]:
        destination = Destination.choose(self.settings.queue, queue, priority_class)
        jobs = yield from prepare_many(list(requests), destination, self._directory, job_ids)
        return (yield from enqueue(jobs, is_durable=durable))


def gather_fields(prompt: Prompt, messages: Messages, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `JobRequest`. Raises InvalidJobError if the prompt is given twice."""
    gathered = dict(fields)
    if prompt is not None and gathered.get("prompt") is not None:
        raise InvalidJobError("prompt: was given twice, by position and by name; give it once", param="prompt")
    if prompt is not None:
        gathered["prompt"] = prompt
    if messages is not None:
        gathered["messages"] = list(messages) if isinstance(messages, tuple) else messages
    return gathered


def ids_of(jobs: Job | AsyncJob | str | Iterable[Job | AsyncJob | str]) -> list[str]:
    """The ids of one job or of several."""
    several = [jobs] if isinstance(jobs, Job | AsyncJob | str) else jobs
    return [id_and_queue(job)[0] for job in several]


def id_and_queue(job: Job | AsyncJob | str) -> tuple[str, str | None]:
    return (job, None) if isinstance(job, str) else (job.id, job.queue)
