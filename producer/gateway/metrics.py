"""The gateway's figures for Prometheus: its own requests, all jobs that end, what queues and workers say."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from producer.contract import JobOutcome, WorkerInfo, keys
from producer.deliveries import WebhookCounts
from producer.gateway.console.ended_jobs import EndedJob
from producer.gateway.token_timer import TokenTimer
from producer.queues import QueueStatus

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
JOB_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 10800, 43200, 86400)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
OF_ALL = "Each gateway counts those of all: take the max() over gateways, not the sum()."

# Numbers of a worker that are not metrics: they identify it.
_NO_FIGURES = frozenset({"v", "pid", "started_at", "beat_at"})


class GatewayMetrics:
    """One process's. Labels hold routes, models and queues, never a path, a key or a prompt."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._fleet = _Fleet()
        self._registry.register(self._fleet)
        self._jobs = _EndedJobs(self._registry)
        self._requests = Counter(
            "promptmill_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "promptmill_http_request_seconds",
            "Seconds from a request to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.open_streams = Gauge("promptmill_open_streams", "Streams that are being sent.", registry=self._registry)
        self._first_token = Histogram(
            "promptmill_time_to_first_token_seconds",
            "Seconds from a streamed request to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._next_token = Histogram(
            "promptmill_inter_token_seconds",
            "Seconds from one streamed token to the next.",
            ["model"],
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_end(self, job: EndedJob) -> None:
        """A job that has ended since this process began, whoever asked for it."""
        self._jobs.observe(job)

    def token_timer(self, model: str) -> TokenTimer:
        return TokenTimer(self._first_token.labels(model).observe, self._next_token.labels(model).observe)

    def render(
        self,
        queues: Sequence[QueueStatus],
        workers: Sequence[WorkerInfo],
        batches: Mapping[str, int],
        webhooks: WebhookCounts | None,
        *,
        is_redis_up: bool,
    ) -> bytes:
        """Everything in Prometheus's text format. `batches`: how many, by status."""
        self._fleet.queues, self._fleet.workers, self._fleet.is_redis_up = queues, workers, is_redis_up
        self._fleet.batches, self._fleet.webhooks = batches, webhooks
        self._jobs.begin(queue.name for queue in queues)
        return generate_latest(self._registry)


class _EndedJobs:
    """Jobs of all producers, by the queue without its tenant: there may be thousands of those. Every gateway counts all
    of them, so that none is missed while one is away."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("promptmill_jobs_ended", f"Jobs ended. {OF_ALL}", ["queue", "outcome"], registry=registry)
        self._tokens = Counter(
            "promptmill_job_tokens", f"Tokens of the jobs that ended. {OF_ALL}", ["queue", "kind"], registry=registry
        )
        self._queued = Histogram(
            "promptmill_job_queued_seconds",
            f"Seconds from a job's enqueueing to its claim. {OF_ALL}",
            ["queue"],
            buckets=JOB_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "promptmill_job_seconds",
            f"Seconds from a job's enqueueing to its end. {OF_ALL}",
            ["queue"],
            buckets=JOB_SECONDS,
            registry=registry,
        )

    def begin(self, queues: Iterable[str]) -> None:
        """Create the series at zero: one that begins with its first job hides that job from `increase`."""
        for queue in {keys.split_tenant(name)[0] for name in queues}:
            for outcome in get_args(JobOutcome):
                self._ended.labels(queue, outcome)
            for kind in ("prompt", "output"):
                self._tokens.labels(queue, kind)
            self._queued.labels(queue)
            self._seconds.labels(queue)

    def observe(self, job: EndedJob) -> None:
        queue = keys.split_tenant(job.queue)[0]
        self._ended.labels(queue, job.status).inc()
        self._tokens.labels(queue, "prompt").inc(job.usage.prompt_tokens)
        self._tokens.labels(queue, "output").inc(job.usage.completion_tokens)
        if job.timings.queued is not None:
            self._queued.labels(queue).observe(job.timings.queued)
        if job.timings.total is not None and job.status == "finished":  # what was cut short says nothing
            self._seconds.labels(queue).observe(job.timings.total)


class _Fleet(Collector):
    """Queues and workers as they were last read: every numeric field of a worker's info is a gauge."""

    def __init__(self) -> None:
        self.queues: Sequence[QueueStatus] = ()
        self.workers: Sequence[WorkerInfo] = ()
        self.batches: Mapping[str, int] = {}
        self.webhooks: WebhookCounts | None = None
        self.is_redis_up = False

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("promptmill_redis_up", "Whether Redis answers.", value=float(self.is_redis_up))
        yield GaugeMetricFamily("promptmill_workers", "Live workers.", value=len(self.workers))
        jobs = GaugeMetricFamily("promptmill_queue_jobs", "Jobs of a queue by state.", labels=["queue", "state"])
        queues = [queue for queue in self.queues if not queue.is_at_rest]  # of tenants there may be thousands
        for queue in queues:
            jobs.add_metric([queue.name, "waiting"], queue.depth)
            for state, count in queue.registries.items():
                jobs.add_metric([queue.name, state], count)
        yield jobs
        oldest = GaugeMetricFamily(
            "promptmill_queue_oldest_job_seconds", "How long a queue's next job has been waiting.", labels=["queue"]
        )
        for queue in queues:
            oldest.add_metric([queue.name], queue.oldest_seconds or 0.0)
        yield oldest
        batches = GaugeMetricFamily(
            "promptmill_batches", "Batches; ended ones are counted for good.", labels=["status"]
        )
        for status, count in self.batches.items():
            batches.add_metric([status], count)
        yield batches
        webhooks = GaugeMetricFamily(
            "promptmill_webhooks", "Webhooks that wait for their receivers, or came to nothing.", labels=["state"]
        )
        if self.webhooks is not None:
            webhooks.add_metric(["waiting"], self.webhooks.waiting)
            webhooks.add_metric(["dead"], self.webhooks.dead)
        yield webhooks
        for name, annotation in _figures().items():
            text = f"A worker's {annotation}, as it says itself."
            family = GaugeMetricFamily(f"promptmill_worker_{name}", text, labels=["worker", "model"])
            for worker in self.workers:
                value = getattr(worker, name)
                if value is not None:
                    family.add_metric([worker.name, worker.models[0] if worker.models else ""], float(value))
            yield family


def _figures() -> dict[str, str]:
    kinds = (int, float, int | None, float | None)
    fields = WorkerInfo.model_fields.items()
    names = [name for name, info in fields if info.annotation in kinds and name not in _NO_FIGURES]
    return {name: name.replace("_", " ") for name in names}
