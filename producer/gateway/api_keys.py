"""API keys as Redis keeps them: an id, the hash of a secret, and what the key may do. The secret itself is shown once.

A key is `pm-ID-SECRET`. The secret has 256 random bits, so a plain SHA-256 of it cannot be searched for; it is compared
in constant time. Protocols without I/O, for the gateway and the command line alike.
"""

import hashlib
import hmac
import re
import secrets
import time

from pydantic import BaseModel, ConfigDict, Field

from producer.contract.keys import TENANT_PATTERN
from producer.operations import Protocol, send

API_KEYS_KEY = "promptmill:gateway:api_keys"  # HASH: key id → JSON of an ApiKey

_KEY_PATTERN = re.compile(r"pm-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")


class ApiKey(BaseModel):
    """A limit of None is no limit; an empty `models` allows all. An operator sees /stats, /metrics and everybody's
    jobs."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: str = Field(min_length=1, max_length=100)
    secret_sha256: str
    created_at: float  # epoch seconds
    tenant: str | None = Field(default=None, pattern=f"^{TENANT_PATTERN}$")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    models: list[str] = []
    is_operator: bool = False

    def allows(self, model: str) -> bool:
        return not self.models or model in self.models


def make_key(**fields: object) -> tuple[ApiKey, str]:
    """A new key, and its text, which nobody else keeps. Raises pydantic.ValidationError."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    values = {**fields, "id": key_id, "secret_sha256": _hash(secret), "created_at": time.time()}
    return ApiKey.model_validate(values), f"pm-{key_id}-{secret}"


def add_key(key: ApiKey) -> Protocol[None]:
    yield from send(("HSET", API_KEYS_KEY, key.id, key.model_dump_json()))


def list_keys() -> Protocol[list[ApiKey]]:
    """The oldest first."""
    [values] = yield from send(("HVALS", API_KEYS_KEY))
    return sorted((ApiKey.model_validate_json(value) for value in values), key=lambda key: key.created_at)


def revoke_key(key_id: str) -> Protocol[bool]:
    """Returns whether there was such a key."""
    [num_removed] = yield from send(("HDEL", API_KEYS_KEY, key_id))
    return bool(num_removed)


def has_keys() -> Protocol[bool]:
    [num_keys] = yield from send(("HLEN", API_KEYS_KEY))
    return bool(num_keys)


def read_key(key_id: str) -> Protocol[ApiKey | None]:
    [value] = yield from send(("HGET", API_KEYS_KEY, key_id))
    return ApiKey.model_validate_json(value) if value is not None else None


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret; None if the text does not have the form of a key."""
    found = _KEY_PATTERN.fullmatch(text)
    return (found[1], found[2]) if found is not None else None


def is_secret_of(key: ApiKey, secret: str) -> bool:
    return hmac.compare_digest(key.secret_sha256, _hash(secret))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
