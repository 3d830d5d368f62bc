"""The keys of batches in Redis, and how long they are kept.

    promptmill:batch:ID              HASH: what `BatchRecord` has, and `fence`: who carried it last
    promptmill:batch:ID:answered     bitmap: lines that are answered in the output or error file, by position from 0
    promptmill:batches:open          ZSET: ids of batches that have not ended, scored by their lease's end
    promptmill:batches:index:WHOSE   ZSET: ids, all scored 0, for lists
    promptmill:batches:asked:HASH    "ID ASKED": what was made under an idempotency key, and the hash of its request
    promptmill:batches:ended         HASH: how many have ended, by status

Ids are made as files' are (`file_keys.make_id`): they sort by age, so that a cursor outlives its batch.
"""

import hashlib
import json
from typing import Any

BATCH_PREFIX = "promptmill:batch:"
INDEX_PREFIX = "promptmill:batches:index:"
ASKED_PREFIX = "promptmill:batches:asked:"
OPEN_KEY = "promptmill:batches:open"
ENDED_KEY = "promptmill:batches:ended"

ID_PREFIX = "batch_"
ID_PATTERN = rf"{ID_PREFIX}[0-9a-f]{{30}}"
RECORD_TTL_SECONDS = 30 * 24 * 3600  # from a batch's end; its files expire by themselves
WINDOW_SECONDS = 24 * 3600  # completion_window
KEY_TTL_SECONDS = 24 * 3600  # as long as an idempotency key finds a job


def batch_key(batch_id: str) -> str:
    return BATCH_PREFIX + batch_id


def answered_key(batch_id: str) -> str:
    return f"{BATCH_PREFIX}{batch_id}:answered"


def index_key(whose: str) -> str:
    """`whose`: a key's id, or one of `file_keys`' EVERYBODYS and NOBODYS."""
    return INDEX_PREFIX + whose


def asked_key(whose: str, idempotency_key: str) -> str:
    return ASKED_PREFIX + hash_json([whose, idempotency_key])


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:40]
