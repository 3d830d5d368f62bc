"""Webhook endpoints as Redis keeps them. Protocols without I/O, for gateway and command line.

Receivers and we share the secrets, so unlike API keys they are kept as they are. An endpoint that answered 410 (gone)
is listed in `DISABLED_KEY` and gets nothing more.
"""

import base64
import secrets
import time

from pydantic import BaseModel, ConfigDict, Field

from producer.gateway.webhooks.outbox import EVENT_TYPES, EventType
from producer.operations import Protocol, Script, send

ENDPOINTS_KEY = "promptmill:webhooks:endpoints"  # HASH: endpoint id → JSON of a WebhookEndpoint
DISABLED_KEY = "promptmill:webhooks:disabled"  # HASH: endpoint id → epoch second of its 410

MAX_ENDPOINTS_A_KEY = 50
OLD_SECRET_SECONDS = 24 * 3600  # how long the secret before the last rotation goes on signing, where that was asked for
SECRET_PREFIX = "whsec_"


class SigningSecret(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    text: str
    valid_until: float | None = None  # epoch seconds


class WebhookEndpoint(BaseModel):
    """`key_id`: it hears of that API key's batches; None: of everybody's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: str = Field(min_length=1, max_length=100)
    url: str
    event_types: tuple[EventType, ...] = Field(min_length=1)
    key_id: str | None
    secrets: tuple[SigningSecret, ...]  # the newest first
    created_at: int  # epoch seconds
    updated_at: int

    @classmethod
    def create(
        cls, *, name: str, url: str, key_id: str | None, event_types: tuple[str, ...] = EVENT_TYPES
    ) -> "WebhookEndpoint":
        """Raises pydantic.ValidationError. The URL is not checked here."""
        now = int(time.time())
        fields = {"name": name, "url": url, "key_id": key_id, "event_types": event_types}
        own = {"id": f"we_{secrets.token_hex(12)}", "secrets": [_make_secret()], "created_at": now, "updated_at": now}
        return cls.model_validate({**fields, **own})

    def changed(self, **fields: object) -> "WebhookEndpoint":
        """Raises pydantic.ValidationError."""
        values = {**self.model_dump(), **fields}
        if values == self.model_dump():
            return self
        return type(self).model_validate({**values, "updated_at": int(time.time())})

    def rotated(self, *, keeps_old: bool) -> "WebhookEndpoint":
        """With a new secret; the old one signs beside it for a day, or no more."""
        kept = [SigningSecret(text=self.secret, valid_until=time.time() + OLD_SECRET_SECONDS)] if keeps_old else []
        return self.changed(secrets=[_make_secret(), *kept])

    @property
    def secret(self) -> str:
        return self.secrets[0].text

    def valid_secrets(self) -> list[str]:
        """Those that sign now, the newest first."""
        now = time.time()
        return [secret.text for secret in self.secrets if secret.valid_until is None or secret.valid_until > now]


def _make_secret() -> SigningSecret:
    return SigningSecret(text=SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode())


def add_endpoint(endpoint: WebhookEndpoint) -> Protocol[None]:
    yield from send(("HSET", ENDPOINTS_KEY, endpoint.id, endpoint.model_dump_json()))


def list_endpoints() -> Protocol[list[WebhookEndpoint]]:
    """The newest first."""
    [values] = yield from send(("HVALS", ENDPOINTS_KEY))
    found = [WebhookEndpoint.model_validate_json(value) for value in values]
    return sorted(found, key=lambda endpoint: (endpoint.created_at, endpoint.id), reverse=True)


def read_endpoint(endpoint_id: str) -> Protocol[WebhookEndpoint | None]:
    [value] = yield from send(("HGET", ENDPOINTS_KEY, endpoint_id))
    return WebhookEndpoint.model_validate_json(value) if value is not None else None


def replace_endpoint(old: WebhookEndpoint, new: WebhookEndpoint) -> Protocol[bool]:
    """False if somebody else changed it, or took it away, since `old` was read. One that was gone is called again."""
    keys, arguments = [ENDPOINTS_KEY, DISABLED_KEY], [old.id, old.model_dump_json(), new.model_dump_json()]
    return bool((yield from _REPLACE.run(keys, arguments)))


def remove_endpoint(endpoint_id: str) -> Protocol[bool]:
    """Whether there was one. What was under way to it is dropped."""
    [num_removed, _] = yield from send(("HDEL", ENDPOINTS_KEY, endpoint_id), ("HDEL", DISABLED_KEY, endpoint_id))
    return bool(num_removed)


def enable_endpoint(endpoint_id: str) -> Protocol[bool]:
    """Whether it had been disabled."""
    [num_removed] = yield from send(("HDEL", DISABLED_KEY, endpoint_id))
    return bool(num_removed)


def disable_endpoint(endpoint_id: str) -> Protocol[None]:
    yield from send(("HSET", DISABLED_KEY, endpoint_id, int(time.time())))


def list_disabled() -> Protocol[set[str]]:
    [names] = yield from send(("HKEYS", DISABLED_KEY))
    return {name.decode() for name in names}


_REPLACE = Script("""
local endpoints, disabled = KEYS[1], KEYS[2]
local id, old, new = ARGV[1], ARGV[2], ARGV[3]
local stored = redis.call('HGET', endpoints, id)
if stored == new then return 1 end  -- our own reply was lost
if stored ~= old then return 0 end
redis.call('HSET', endpoints, id, new)
redis.call('HDEL', disabled, id)
return 1
""")
