"""Replies of a client that decodes nothing, by their types: redis-py's signatures leave text and bytes open."""

from typing import cast

import redis


def stream_rows(client: redis.Redis, key: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries of a stream, from its beginning: id and fields."""
    return cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(key))


def last_row(client: redis.Redis, key: str) -> tuple[bytes, dict[bytes, bytes]] | None:
    """The newest of them, and no other is read."""
    rows = cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrevrange(key, count=1))
    return rows[0] if rows else None


def sorted_set_names(client: redis.Redis, key: str) -> list[str]:
    """Members of a sorted set, lowest score first."""
    return [name.decode() for name in cast(list[bytes], client.zrange(key, 0, -1))]


def set_names(client: redis.Redis, key: str) -> set[str]:
    """Members of a set."""
    return {name.decode() for name in cast(set[bytes], client.smembers(key))}


def sorted_set_scores(client: redis.Redis, key: str) -> dict[str, float]:
    """The same with their scores."""
    scored = cast(list[tuple[bytes, float]], client.zrange(key, 0, -1, withscores=True))
    return {name.decode(): score for name, score in scored}
