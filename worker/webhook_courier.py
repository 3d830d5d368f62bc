"""Delivers the webhooks of ended jobs of any worker, at least once.

A delivery is in Redis from the job's commit on (`producer.job_webhooks`) and is settled when its receiver has answered.
If a worker ends or dies in between, another one delivers it again, with the same `webhook-id`. Jobs do not wait for
deliveries.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection
from functools import partial

from producer.deliveries import LOG_LEVELS, RetryDelay, retry_delay, settle_answer, settle_delivery
from producer.errors import ClientClosedError, RedisUnavailableError
from producer.job_webhooks import JobDelivery, claim_job_webhooks, give_up_job_webhooks
from producer.transport import Transport
from worker.allowed_urls import find_allowed
from worker.background import BackgroundThreads

POLL_SECONDS = 1.0
GIVE_UP_LOOK_SECONDS = 60.0  # between looks for deliveries that no worker accepts
REDIS_AWAY_SECONDS = 5.0
NUM_THREADS = 16  # a receiver that does not answer blocks one for its webhook's timeout
MAX_TO_RECEIVER = 8  # at a time, for each allowed URL

_log = logging.getLogger(__name__)


class WebhookCourier:
    """`allowed`: the URLs at or below which webhooks may be; others are not delivered. Without any, the courier still
    gives up deliveries that no worker accepts."""

    def __init__(self, redis_url: str, allowed: Collection[str], *, delay_after: RetryDelay = retry_delay) -> None:
        self._transport = Transport(redis_url)
        self._allowed = tuple(allowed)
        self._delay_after = delay_after
        self._senders = BackgroundThreads(NUM_THREADS if allowed else 0, "webhook")
        self._under_way: Counter[str] = Counter()  # by receiver, which is the allowed URL
        self._lock = threading.Lock()  # guards the counter
        self._has_news = threading.Event()
        self._gives_up_at = 0.0  # monotonic seconds
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Call after the commit of a job with webhooks."""
        self._has_news.set()

    def stop(self) -> None:
        """Claim no more deliveries. Those under way may end; another worker delivers the rest after their leases."""
        self._is_stopping = True
        self.wake()

    def close(self, timeout_seconds: float) -> None:
        """Call after `stop`."""
        self._senders.stop(timeout_seconds)
        self._transport.close()

    def _run(self) -> None:
        while not self._is_stopping:
            pause = POLL_SECONDS if self._allowed else GIVE_UP_LOOK_SECONDS
            self._has_news.clear()
            try:
                self._claim_some()
                self._give_up_some()
            except RedisUnavailableError as error:
                _log.warning("action=webhooks_wait error=%s", error)
                pause = REDIS_AWAY_SECONDS
            except Exception:  # of any type: undelivered webhooks are tried in the next turn
                _log.exception("action=webhooks_failed")
                pause = REDIS_AWAY_SECONDS
            self._has_news.wait(pause)

    def _claim_some(self) -> None:
        with self._lock:
            room = {url: MAX_TO_RECEIVER - self._under_way[url] for url in self._allowed}
            num_free = NUM_THREADS - self._under_way.total()
        if num_free <= 0 or not room:
            return
        for delivery in self._transport.run(claim_job_webhooks(num_free, room)):
            with self._lock:
                self._under_way[delivery.receiver] += 1
            self._senders.submit(partial(self._deliver, delivery))

    def _give_up_some(self) -> None:
        if time.monotonic() < self._gives_up_at:
            return
        if num_given_up := self._transport.run(give_up_job_webhooks()):
            _log.error("action=webhooks_given_up num_deliveries=%d", num_given_up)
        self._gives_up_at = time.monotonic() + GIVE_UP_LOOK_SECONDS

    def _deliver(self, delivery: JobDelivery) -> None:
        try:
            self._attempt(delivery)
        except (RedisUnavailableError, ClientClosedError) as error:  # closed: the delivery outlasted this worker
            _log.warning("action=webhook_unsettled delivery=%s error=%s", delivery.id, error)
        finally:
            with self._lock:
                self._under_way[delivery.receiver] -= 1
            self.wake()  # there is a free thread again

    def _attempt(self, delivery: JobDelivery) -> None:
        from worker.webhook_sender import send_webhook  # imports an HTTP client, which most workers never need

        webhook = delivery.webhook
        if find_allowed(webhook.url, self._allowed) is None:
            self._transport.run(settle_delivery(delivery, "dead", error="its URL is not one that is allowed here"))
            return
        answer = send_webhook(webhook, message_id=delivery.id)
        verdict = self._transport.run(settle_answer(delivery, answer, self._delay_after))
        what = f"delivery={delivery.id} job_id={webhook.job_id} attempt={delivery.attempt}"
        _log.log(
            LOG_LEVELS[verdict], "action=webhook_%s %s status=%s error=%s", verdict, what, answer.status, answer.problem
        )
