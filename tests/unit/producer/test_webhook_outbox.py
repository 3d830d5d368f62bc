"""Events on their way into the outbox."""

import json

import pytest
from pydantic import ValidationError

from producer.gateway.webhooks.outbox import Event


def test_an_event_has_the_same_id_however_often_it_is_told() -> None:
    first = Event.of("batch.completed", "batch_1", key_id="k", created_at=7)
    assert first == Event.of("batch.completed", "batch_1", key_id="k", created_at=7)
    assert first.id.startswith("evt_") and len(first.id) == 36
    assert first.id != Event.of("batch.failed", "batch_1", key_id="k", created_at=7).id
    assert first.id != Event.of("batch.completed", "batch_2", key_id="k", created_at=7).id


def test_a_receiver_gets_openais_form_and_not_the_key() -> None:
    event = Event.of("batch.cancelled", "batch_1", key_id="secretive", created_at=7)
    assert json.loads(event.to_body()) == {
        "id": event.id,
        "object": "event",
        "created_at": 7,
        "type": "batch.cancelled",
        "data": {"id": "batch_1"},
    }


def test_only_known_events_can_be_told() -> None:
    with pytest.raises(ValidationError):
        Event.of("batch.started", "batch_1", key_id=None, created_at=7)  # type: ignore[arg-type]
