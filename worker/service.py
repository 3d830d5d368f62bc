"""One worker on a started engine: builds its parts, runs the loop, hands jobs over at the end. `worker.run` is its
process."""

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import redis

from engine.engine import InferenceEngine
from producer.contract import WorkerInfo, keys
from worker.chat import ChatRenderer, read_template
from worker.control import ControlListener
from worker.errors import HandOverError
from worker.housekeeping import Chore, Housekeeper
from worker.intake import Intake
from worker.job_loop import JobLoop
from worker.job_parts import JobParts
from worker.leases import LeaseKeeper
from worker.outlet.base import ResultStore
from worker.outlet.stream import StreamOutlet
from worker.parsing.model_format import ModelFormat
from worker.queue_watch import QueueWatch
from worker.recovery import Sweeper
from worker.redis_client import REDIS_AWAY, find_fault, reached
from worker.redis_clock import RedisClock
from worker.rq_bridge import SLOTS_SECONDS, JobReader, Outcomes, RqBridge, max_call_bytes
from worker.scripts import Scripts
from worker.settings import WorkerSettings
from worker.tenant_queues import LOOK_SECONDS, TenantQueues
from worker.translate import Translator
from worker.webhook_courier import WebhookCourier

HAND_OVER_SECONDS = 1.0  # for which a failed hand-over is retried
HAND_OVER_RETRY_SECONDS = 0.05
THREADS_END_SECONDS = 0.2
SCHEDULER_SECONDS = 1.0
READY_SECONDS = 5.0  # at most, until dependents are enqueued whose enqueueing was interrupted
MAINTENANCE_SECONDS = 600.0
STATS_SECONDS = 1.0
SERVER_SECONDS = 60.0
MIN_PREFETCHED_SEQS = 4

_log = logging.getLogger(__name__)


class WorkerService:
    """A worker's parts on a running engine. `run()` may be called once."""

    def __init__(
        self, settings: WorkerSettings, client: redis.Redis, engine: InferenceEngine, store: ResultStore | None
    ) -> None:
        self._settings = settings
        self._client = client
        self._engine = engine
        self.name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
        self._started_at = time.time()
        self._stats: dict[str, Any] = {}
        self._has_handed_over = False
        self._scripts = Scripts()
        self._clock = RedisClock()
        self._bridge = RqBridge(client, settings.queue_names, name=self.name)
        reader = JobReader(
            client,
            allowed_callbacks=settings.allowed_callbacks,
            allowed_webhooks=settings.allowed_webhooks,
            max_call_bytes=max_call_bytes(engine.info.max_model_len),
        )
        self._intake = self._build_intake(reader)
        self._outcomes = Outcomes(self._bridge, reader)
        self._courier = WebhookCourier(settings.redis_url, settings.allowed_webhooks)
        self._loop = self._build_loop(store)
        self._leases = self._build_leases()
        control = ControlListener(
            client,
            self._bridge.pubsub_channel_name,
            on_cancel=lambda job_id: self._loop.request_job_stop(job_id, "cancelled"),
            on_stop_job=lambda job_id: self._loop.request_job_stop(job_id, "stopped"),
            on_shutdown=self._loop.request_stop,
        )
        watch = QueueWatch(
            client,
            queues=settings.queue_names,
            has_limits=settings.max_running_per_tenant is not None or bool(settings.limits_by_tenant),
            on_arrival=self._loop.pace.note_arrival,
            on_watching=self._loop.pace.set_watched,
        )
        self._tenants = TenantQueues(client, self._scripts, queues=settings.queue_names)
        self._housekeepers = self._build_housekeepers()
        self._threads: list[ControlListener | QueueWatch | WebhookCourier | Housekeeper]
        self._threads = [control, watch, self._courier, *self._housekeepers]

    def _build_intake(self, reader: JobReader) -> Intake:
        settings = self._settings
        return Intake(
            self._client,
            self._scripts,
            reader,
            self._build_translator(),
            queues=settings.queue_names,
            worker=self.name,
            model=settings.served_model_names[0],
            fingerprint=self._engine.info.fingerprint,
            lease_seconds=settings.lease_seconds,
            tenant_limit=settings.max_running_per_tenant,
            tenant_limits=settings.limits_by_tenant,
        )

    def _build_translator(self) -> Translator:
        settings, tokenizer = self._settings, self._engine.tokenizer
        template, tool_template = tokenizer.chat_template, tokenizer.tool_chat_template
        if settings.chat_template is not None:
            template, tool_template = read_template(settings.chat_template), None
        chat = ChatRenderer(
            template, tool_template=tool_template, special_tokens=tokenizer.special_tokens, model=settings.model
        )
        model_format = ModelFormat.select(
            tokenizer,
            [source for source in (template, tool_template) if source is not None],
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        names, reader = settings.served_model_names, self._engine.embedding_reader
        return Translator(tokenizer, chat, model_format, self._engine.info, names, reader)

    def _build_loop(self, store: ResultStore | None) -> JobLoop:
        settings = self._settings
        num_prefetched = max(MIN_PREFETCHED_SEQS, settings.max_num_seqs // 8)  # so that no step waits for a claim
        max_num_seqs = settings.max_num_seqs + num_prefetched
        parts = JobParts(
            client=self._client,
            clock=self._clock,
            engine=self._engine,
            scripts=self._scripts,
            intake=self._intake,
            outlet=StreamOutlet(self._client, self._scripts),
            store=store,
            outcomes=self._outcomes,
            courier=self._courier,
        )
        return JobLoop(
            parts,
            max_num_seqs=max_num_seqs,
            max_num_jobs=settings.max_num_jobs or 2 * max_num_seqs,
            finishes_on_stop=settings.drain == "finish",
            drain_seconds=settings.drain_seconds,
        )

    def _build_leases(self) -> LeaseKeeper:
        return LeaseKeeper(
            self._client,
            self._scripts,
            self._bridge,
            self._clock,
            lease_seconds=self._settings.lease_seconds,
            held=self._loop.held,
            describe=self._describe,
            is_suspended=lambda: self._intake.is_suspended,
            on_verdict=self._loop.report_verdict,
        )

    def _build_housekeepers(self) -> list[Housekeeper]:
        """Dead workers' jobs have a thread of their own: the other maintenance goes through every tenant's queues."""
        sweeper = Sweeper(
            self._client,
            self._scripts,
            queues=self._settings.queue_names,
            lease_seconds=self._settings.lease_seconds,
            on_orphan=self._loop.adopt,
        )
        return [
            Housekeeper([Chore("sweep", sweeper.interval_seconds, sweeper.sweep)], name="sweep"),
            Housekeeper(
                [
                    Chore("tenants", LOOK_SECONDS, self._tenants.look),
                    Chore("scheduler", SCHEDULER_SECONDS, self._run_scheduler),
                    Chore("ready", READY_SECONDS, lambda _: self._outcomes.enqueue_ready(self._tenants.names)),
                    Chore("slots", SLOTS_SECONDS, lambda _: self._bridge.free_slots()),
                    Chore("maintenance", MAINTENANCE_SECONDS, self._clean_registries),
                    Chore("stats", STATS_SECONDS, self._ask_stats),
                    Chore("server", SERVER_SECONDS, self._look_at_server),
                ]
            ),
        ]

    def request_stop(self) -> None:
        """Thread-safe, and safe in a signal handler."""
        self._loop.request_stop()

    @property
    def holds_jobs(self) -> bool:
        """Whether jobs would wait for the end of their leases if the process ended now. Thread-safe, and safe in a
        signal handler."""
        return not self._has_handed_over and len(self._loop.held) > 0

    def run(self, *, on_serving: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop, then hand over. `on_serving` is called just before the first claim. Raises
        HandOverError if jobs could not be given back."""
        with reached(self._settings.redis_url):
            self._bridge.register()
        on_serving()
        for thread in (self._leases, *self._threads):
            thread.start()
        queues, context_length = ",".join(self._settings.queue_names), self._engine.info.max_model_len
        _log.info("action=serving worker=%s queues=%s context_length=%d", self.name, queues, context_length)
        try:
            while not self._loop.is_done:
                self._leases.tick()
                self._loop.turn()
        finally:
            self._hand_over()
        if self._loop.failure is not None:
            raise self._loop.failure

    def _hand_over(self) -> None:
        for thread in reversed(self._threads):
            thread.stop()
        num_jobs, end = 0, time.monotonic() + HAND_OVER_SECONDS
        while True:
            try:
                num_jobs = self._loop.hand_over()
                self._has_handed_over = True
                self._leases.stop(THREADS_END_SECONDS)
                for housekeeper in self._housekeepers:
                    housekeeper.join(THREADS_END_SECONDS)  # so that RQ's scheduler locks no queue after the sign-off
                self._sign_off()
                break
            except REDIS_AWAY as error:
                if time.monotonic() > end:
                    self._leases.stop(0.0)
                    if self.holds_jobs:
                        message = f"Redis is away ({error}): the worker's jobs come back when their leases end"
                        raise HandOverError(message) from error
                    _log.warning("action=not_signed_off worker=%s error=%s", self.name, error)  # its entries expire
                    break
            time.sleep(HAND_OVER_RETRY_SECONDS)
        self._courier.close(THREADS_END_SECONDS)
        _log.info("action=handed_over worker=%s num_jobs=%d", self.name, num_jobs)

    def _sign_off(self) -> None:
        self._bridge.unregister()
        with self._client.pipeline() as pipe:
            pipe.delete(keys.worker_key(self.name))
            pipe.zrem(keys.WORKERS_KEY, self.name)
            pipe.execute()

    def _describe(self) -> WorkerInfo:
        info = self._engine.info
        return WorkerInfo(
            name=self.name,
            queues=self._settings.queue_names,
            models=self._settings.served_model_names,
            context_length=info.max_model_len,
            max_request_bytes=max_call_bytes(info.max_model_len),
            device=info.device,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started_at,
            num_running=self._stats.get("num_running", 0),
            num_waiting=self._stats.get("num_waiting", 0),
            kv_blocks_used=self._stats.get("num_kv_blocks_used", 0),
            kv_blocks_free=self._stats.get("num_kv_blocks_free", 0),
            tokens_per_second=round(self._loop.tokens_per_second, 1),
            beat_at=round(time.time(), 3),
        )

    def _run_scheduler(self, now: float) -> None:
        self._bridge.run_scheduler(now, tenant_queues=self._tenants.names)

    def _clean_registries(self, now: float) -> None:
        self._tenants.forget_idle(now)  # first: cleaning the registries of thousands of empty queues would take a while
        self._bridge.clean_registries(tenant_queues=self._tenants.names)

    def _look_at_server(self, now: float) -> None:
        """Check Redis again: a fail-over may have led to a server at which no worker would have started."""
        if (fault := find_fault(self._client, self._settings.redis_url)) is not None:
            _log.error("action=redis_unfit reason=%s", fault)

    def _ask_stats(self, now: float) -> None:
        self._stats = self._engine.get_stats()
