"""Events for webhooks. Knows nothing of endpoints, HTTP or signatures.

An event goes into the outbox in the very script or transaction that makes it true, so that neither is without the
other; the dispatcher of any gateway takes it from there.
"""

import hashlib
import json
import secrets
import time
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

OUTBOX_KEY = "promptmill:webhooks:outbox"  # LIST of events as JSON, the oldest first

EventType = Literal["batch.completed", "batch.failed", "batch.cancelled", "batch.expired"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)


class Event(BaseModel):
    """`key_id`: the API key whose business it is; None: nobody's in particular."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str  # also the webhook-id of every delivery: a receiver tells repetitions by it
    type: EventType
    created_at: int  # epoch seconds
    object_id: str  # the batch
    key_id: str | None

    @classmethod
    def of(cls, event_type: EventType, object_id: str, *, key_id: str | None, created_at: int) -> "Event":
        """The id follows from type and object: the same event, made again, has the same id."""
        digest = hashlib.sha256(f"{event_type}:{object_id}".encode()).hexdigest()
        return cls(id=f"evt_{digest[:32]}", type=event_type, created_at=created_at, object_id=object_id, key_id=key_id)

    @classmethod
    def sample(cls, event_type: EventType) -> "Event":
        """For a test of an endpoint: of a batch that does not exist."""
        event_id, now = f"evt_{secrets.token_hex(16)}", int(time.time())
        return cls(id=event_id, type=event_type, created_at=now, object_id="batch_sample", key_id=None)

    def to_wire(self) -> str:
        """What lies in the outbox. Scripts: `redis.call('RPUSH', OUTBOX_KEY, this)`."""
        return self.model_dump_json()

    def to_body(self) -> str:
        """What receivers get, in OpenAI's form."""
        body: dict[str, Any] = {"id": self.id, "object": "event", "created_at": self.created_at}
        return json.dumps({**body, "type": self.type, "data": {"id": self.object_id}}, separators=(",", ":"))
