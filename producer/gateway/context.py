"""The parts of one gateway process, built once and handed to every route."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from producer.async_client import AsyncClient
from producer.async_transport import AsyncTransport
from producer.gateway.batches.batch_records import BatchRecords
from producer.gateway.batches.carrier_child import CarrierChild
from producer.gateway.bodies import Bodies
from producer.gateway.catalog import ModelCatalog
from producer.gateway.console.results_follower import ResultsFollower
from producer.gateway.drain import Drain
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecords
from producer.gateway.files.housekeeping import FileHousekeeping
from producer.gateway.files.select import select_file_store
from producer.gateway.files.threads import FileThreads
from producer.gateway.files.uploads import Uploads
from producer.gateway.job_records import JobRecords
from producer.gateway.key_ring import KeyRing
from producer.gateway.metrics import GatewayMetrics
from producer.gateway.rate_limits import RateLimits
from producer.gateway.settings import GatewaySettings
from producer.gateway.webhooks.dispatcher import WebhookDispatcher
from producer.gateway.webhooks.sender import WebhookSender
from producer.gateway.webhooks.targets import TargetRules


@dataclass(frozen=True, slots=True)
class GatewayContext:
    settings: GatewaySettings
    client: AsyncClient
    redis: AsyncTransport  # for the gateway's own keys
    catalog: ModelCatalog
    bodies: Bodies
    records: JobRecords
    keys: KeyRing
    limits: RateLimits
    drain: Drain
    metrics: GatewayMetrics
    file_store: FileStore
    file_threads: FileThreads
    files: FileRecords
    webhook_targets: TargetRules
    webhook_sender: WebhookSender
    webhooks: WebhookDispatcher
    follower: ResultsFollower
    batches: BatchRecords
    carriers: CarrierChild
    uploads: Uploads
    file_housekeeping: FileHousekeeping

    @classmethod
    def build(cls, settings: GatewaySettings) -> "GatewayContext":
        """Raises SettingsError, also where files cannot be kept."""
        file_store = select_file_store(settings.files, s3_endpoint_url=settings.s3_endpoint_url)
        file_store.check()
        redis = AsyncTransport(settings.redis_url)
        targets = TargetRules(allows_private=settings.webhook_private_targets)
        sender = WebhookSender(targets)
        batches = BatchRecords(redis)
        metrics = GatewayMetrics()
        files, file_threads = FileRecords(redis, file_store), FileThreads()
        housekeeping = FileHousekeeping(files, file_store, file_threads)
        return cls(
            settings=settings,
            client=AsyncClient(settings.redis_url, queue=settings.queue, s3_endpoint_url=settings.s3_endpoint_url),
            redis=redis,
            catalog=ModelCatalog(redis, settings.queue),
            bodies=Bodies(),
            records=JobRecords(redis),
            keys=KeyRing(redis),
            limits=RateLimits(redis),
            drain=Drain(settings.http_drain_seconds),
            metrics=metrics,
            file_store=file_store,
            webhook_targets=targets,
            webhook_sender=sender,
            webhooks=WebhookDispatcher(redis, sender),
            follower=ResultsFollower(redis, settings.queue, on_end=metrics.observe_end),
            batches=batches,
            carriers=CarrierChild(settings, batches),
            file_threads=file_threads,
            files=files,
            uploads=Uploads(files, file_store, file_threads, housekeeping, max_file_bytes=settings.max_file_bytes),
            file_housekeeping=housekeeping,
        )

    def start(self) -> None:
        """Start what runs beside the requests."""
        self.webhooks.start()
        self.carriers.start()
        self.file_housekeeping.start()
        self.follower.start()

    async def aclose(self) -> None:
        await self.carriers.aclose()
        await self.webhooks.aclose()
        await self.file_housekeeping.aclose()
        await self.follower.aclose()
        await self.client.aclose()
        await self.redis.aclose()


def _get_context(request: Request) -> GatewayContext:
    context = request.app.state.context
    assert isinstance(context, GatewayContext)
    return context


Context = Annotated[GatewayContext, Depends(_get_context)]
