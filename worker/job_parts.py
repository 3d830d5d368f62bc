"""The parts of a worker that its loop, admission and finisher share. A plain record."""

from dataclasses import dataclass

import redis

from engine.engine import InferenceEngine
from worker.intake import Intake
from worker.outlet.base import ResultStore
from worker.outlet.stream import StreamOutlet
from worker.redis_clock import RedisClock
from worker.rq_bridge import Outcomes
from worker.scripts import Scripts
from worker.webhook_courier import WebhookCourier


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParts:
    """Made once by the service."""

    client: redis.Redis
    clock: RedisClock
    engine: InferenceEngine
    scripts: Scripts
    intake: Intake
    outlet: StreamOutlet
    store: ResultStore | None  # None: full results stay in Redis
    outcomes: Outcomes
    courier: WebhookCourier
