"""The process that carries a gateway's batches: `python -m producer.gateway.batches.carrier_process`.

It is separate from the gateway's process, so that reading and enqueueing thousands of lines delays no request. The
first line of its input holds its settings, and each further line wakes it. At the end of its input, which comes at the
latest when the gateway dies, it stops. It writes a sign of life every second, so that the gateway notices when it
hangs.
"""

import asyncio
import json
import os
import sys
import threading
from contextlib import suppress

from producer.async_transport import AsyncTransport
from producer.end_tasks import end_tasks
from producer.gateway.batches.batch_lease import BatchLease
from producer.gateway.batches.carrier import Carrier, CarrierOptions
from producer.gateway.batches.carrier_pool import CarrierPool
from producer.gateway.files.file_records import FileRecords
from producer.gateway.files.select import select_file_store
from producer.gateway.settings import GatewaySettings
from producer.logs import configure_logging

IDLE_SECONDS = 60.0
SIGN_SECONDS = 1.0


def main() -> None:
    settings = GatewaySettings(**json.loads(sys.stdin.readline()))
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(_carry(settings))


async def _carry(settings: GatewaySettings) -> None:
    store = select_file_store(settings.files, s3_endpoint_url=settings.s3_endpoint_url)
    redis = AsyncTransport(settings.redis_url, settings.s3_endpoint_url)
    files = FileRecords(redis, store)
    options = CarrierOptions(
        default_queue=settings.queue,
        max_in_flight=settings.batch_max_in_flight,
        max_queue_depth=settings.max_queue_depth,
        max_line_bytes=settings.max_body_bytes,
    )

    def make_carrier(lease: BatchLease) -> Carrier:
        return Carrier(lease, redis=redis, files=files, store=store, options=options)

    pool = CarrierPool(redis, make_carrier, lease_seconds=settings.batch_lease_seconds)
    loop = asyncio.get_running_loop()
    threading.Thread(target=_listen, args=(pool, loop), name="gateway", daemon=True).start()
    os.set_blocking(sys.stdout.fileno(), False)
    signs = asyncio.create_task(_give_signs())
    try:
        await pool.run(IDLE_SECONDS)
    finally:
        await end_tasks(signs)
        await redis.aclose()


async def _give_signs() -> None:
    """Show that the loop runs. The pipe may be full, because the gateway looks seldom."""
    while True:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(sys.stdout.fileno(), b".")
        await asyncio.sleep(SIGN_SECONDS)


def _listen(pool: CarrierPool, loop: asyncio.AbstractEventLoop) -> None:
    try:
        while sys.stdin.readline():
            loop.call_soon_threadsafe(pool.wake)
        loop.call_soon_threadsafe(pool.stop)
    except RuntimeError:
        return  # the loop has ended


if __name__ == "__main__":
    main()
