"""A worker's process: checks its surroundings, starts the engine, serves until it is told to stop.

Whatever hangs, the process is gone two seconds after SIGTERM, SIGINT or SIGHUP; jobs that could not be handed over by
then come back when their leases end.
"""

import gc
import logging

import redis

from engine.engine import InferenceEngine
from producer.contract import keys
from worker.held_signals import held_signals
from worker.outlet.select import select_result_store
from worker.redis_client import check_server, connect, find_weakness, reached
from worker.service import WorkerService
from worker.settings import WorkerSettings
from worker.stop_signals import StopSignals

_log = logging.getLogger(__name__)


def run_worker(settings: WorkerSettings) -> None:
    """Serve until a signal or RQ's shutdown command. For the main thread.

    Raises StartRefusedError or EngineError if the worker cannot start, HandOverError if jobs could not be given back,
    EngineDiedError (after the hand-over) if the engine cannot go on.
    """
    with (
        StopSignals(num_polite=2 if settings.drain == "finish" else 1, drain_seconds=settings.drain_seconds) as signals,
        connect(settings.redis_url) as client,
    ):
        _log.info("action=loading model=%s device=%s", settings.model, settings.device)  # the first time for a minute
        engine = InferenceEngine(config=settings.engine_config)
        try:
            with held_signals():
                engine.launch()  # its child imports for a second or two; this process looks at all else meanwhile
            check_server(client, settings.redis_url)
            with reached(settings.redis_url):
                if (weakness := find_weakness(client)) is not None:
                    _log.warning("action=redis_forgets reason=%s", weakness)
                _announce_models(client, settings.served_model_names)
            store = select_result_store(settings.results, s3_endpoint_url=settings.s3_endpoint_url)
            if store is not None:
                store.check()
            engine.start()
            with reached(settings.redis_url):
                service = WorkerService(settings, client, engine, store)
            gc.freeze()  # what is there now stays: collections that looked at it, too, took the loop 40 to 100 ms each
            service.run(on_serving=lambda: signals.serve(service.request_stop, lambda: service.holds_jobs))
        finally:
            engine.stop()


def _announce_models(client: redis.Redis, models: list[str]) -> None:
    """They are about to be loaded: who asks for one meanwhile is told to wait, also where nobody served it before."""
    with client.pipeline() as pipe:
        pipe.zadd(keys.MODELS_KEY, dict.fromkeys(models, client.time()[0]))
        pipe.expire(keys.MODELS_KEY, keys.MODEL_TTL_SECONDS)
        pipe.execute()
