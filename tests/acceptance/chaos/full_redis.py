"""A Redis that takes no more writes for a while: at one go, or again and again for moments, amid anything."""

import random
import time

import redis

MAX_SECONDS = 3.0
MAX_MOMENT_SECONDS = 0.03
NUM_MOMENTS = 40


def fill(url: str, rng: random.Random) -> str:
    """What it was."""
    with redis.Redis.from_url(url) as client:
        if rng.random() < 0.3:
            seconds = rng.uniform(0.1, MAX_SECONDS)
            _fill_for(client, seconds)
            return f"Redis full for {seconds:.1f} s"
        for _ in range(NUM_MOMENTS):
            _fill_for(client, rng.uniform(0.0, MAX_MOMENT_SECONDS))
            time.sleep(rng.uniform(0.0, MAX_MOMENT_SECONDS))
        return f"Redis full {NUM_MOMENTS} times"


def _fill_for(client: redis.Redis, seconds: float) -> None:
    client.config_set("maxmemory", 1)
    try:
        time.sleep(seconds)
    finally:
        client.config_set("maxmemory", 0)
