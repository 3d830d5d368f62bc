"""Responses whose results lie in a bucket: what is told while these cannot be read, and what a deletion leaves."""

from collections.abc import Iterator
from typing import Any

import boto3
import openai
import pytest

from producer import s3_connection, stored_results
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.flaky_s3 import BUCKET, FlakyS3
from tests.fakes.gateways import StartGateway, open_client
from tests.fakes.storing_worker import storing

ASK: Any = {"model": "fake", "input": "Paris"}


@pytest.fixture
def client(
    start_gateway: StartGateway, s3_server: FlakyS3, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> Iterator[openai.OpenAI]:
    """Of a gateway that asks the store once."""
    monkeypatch.setattr(s3_connection, "MAX_ATTEMPTS", 1)
    stored_results._client.cache_clear()
    gateway = start_gateway(s3_endpoint_url=s3_server.endpoint)
    with open_client(gateway) as opened, worker.serving(storing(s3_server.endpoint)):
        yield opened
    s3_server.heal()
    stored_results._client.cache_clear()


def object_of(response_id: str) -> str:
    return f"jobs/{response_id.removeprefix('resp_')}.json"


def is_there(key: str, endpoint: str) -> bool:
    found = boto3.client("s3", endpoint_url=endpoint).list_objects_v2(Bucket=BUCKET, Prefix=key)
    return bool(found["KeyCount"])


def test_a_store_that_is_away_makes_no_response_a_failed_one(client: openai.OpenAI, s3_server: FlakyS3) -> None:
    done = client.responses.create(**ASK)
    assert (done.status, done.output_text) == ("completed", "Paris")
    reference: Any = [{"type": "item_reference", "id": done.output[0].id}]
    s3_server.is_down = True
    for ask in (
        lambda: client.responses.retrieve(done.id),
        lambda: client.responses.create(**ASK, previous_response_id=done.id),
        lambda: client.responses.create(model="fake", input=reference),
        lambda: client.get(f"/jobs/{done.id}", cast_to=object),
    ):
        with pytest.raises(openai.InternalServerError) as error:
            ask()
        assert (error.value.status_code, error.value.code) == (503, "result_store_error")
        assert error.value.response.headers["retry-after"] and "x-should-retry" not in error.value.response.headers
    s3_server.heal()
    assert client.responses.retrieve(done.id) == done


@pytest.mark.parametrize(("headers", "may_repeat"), [({}, False), ({"Idempotency-Key": "one"}, True)])
def test_an_answer_that_cannot_be_read_is_asked_for_again_only_where_that_makes_no_second_job(
    client: openai.OpenAI, s3_server: FlakyS3, headers: dict[str, str], may_repeat: bool
) -> None:
    s3_server.is_unreadable = True
    with pytest.raises(openai.InternalServerError) as error:
        client.responses.create(**ASK, extra_headers=headers)
    told = error.value.response.headers
    assert error.value.status_code == 503 and told.get("x-should-retry") == (None if may_repeat else "false")
    s3_server.heal()
    assert client.responses.retrieve(f"resp_{told['x-promptmill-job-id']}").output_text == "Paris"


def test_a_response_that_may_not_be_read_is_no_failed_one(client: openai.OpenAI, s3_server: FlakyS3) -> None:
    done = client.responses.create(**ASK)
    s3_server.refused.add(f"/{BUCKET}/{object_of(done.id)}")
    for ask in (
        lambda: client.responses.retrieve(done.id),
        lambda: client.responses.create(**ASK, previous_response_id=done.id),
    ):
        with pytest.raises(openai.InternalServerError, match="grant s3:GetObject") as error:
            ask()
        assert (error.value.status_code, error.value.code) == (502, "result_store_error")
    job: Any = client.get(f"/jobs/{done.id}", cast_to=object)
    assert (job["status"], job["error"]["code"]) == ("finished", "result_store_error")


def test_a_response_is_deleted_in_the_store_too_or_is_still_there(client: openai.OpenAI, s3_server: FlakyS3) -> None:
    done = client.responses.create(**ASK)
    s3_server.is_down = True
    with pytest.raises(openai.InternalServerError, match="grant s3:DeleteObject"):
        client.responses.delete(done.id)
    s3_server.heal()
    assert is_there(object_of(done.id), s3_server.endpoint)
    assert client.responses.retrieve(done.id) == done
    client.responses.delete(done.id)
    assert not is_there(object_of(done.id), s3_server.endpoint)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(done.id)
