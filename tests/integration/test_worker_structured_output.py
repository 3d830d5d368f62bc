"""Structured output through a worker and a real child: the contract's fields, their errors, and a hand-over between."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
from rq import Queue

from engine import InferenceEngine
from producer.contract import ErrorCode, keys
from tests.fakes.tiny_models import make_tiny_model
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, stream_text, wait_for_no_leftovers, wait_for_result

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "languages": {"type": "array", "items": {"enum": ["de", "en", "fr"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}


def worker_on(redis_url: str, model: str) -> WorkerThread:
    engine = InferenceEngine(model, num_threads=1, num_kv_blocks=512)
    engine.start()
    return WorkerThread(redis_url, engine)  # type: ignore[arg-type]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.model
def test_the_demo_model_answers_in_the_form_that_a_job_asks_for(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    messages = [{"role": "user", "content": "Describe Marie Curie."}]
    asks: list[dict[str, Any]] = [
        {"response_format": schema_format(PERSON)},
        {"regex": r"Marie [A-Z][a-z]{2,9} \(born [0-9]{4}\)"},
        {"choice": ["physicist", "physician", "painter"]},
        {"grammar": 'start: "In " YEAR ", " /[a-z ]{5,40}/ "."\nYEAR: /1[89][0-9]{2}/'},
        {"regex": "(a"},
    ]
    with worker_on(redis_url, "smollm2-135m"):
        jobs = [
            queue.enqueue(FUNCTION, messages=messages, max_tokens=120, temperature=0.7, seed=at, **ask)
            for at, ask in enumerate(asks)
        ]
        *answers, refused = [wait_for_result(redis_client, job.id) for job in jobs]
        wait_for_no_leftovers(redis_client)
    assert [answer.choices[0].finish_reason for answer in answers] == ["stop"] * 4
    texts = [answer.choices[0].text for answer in answers]
    jsonschema.validate(json.loads(texts[0]), PERSON)
    assert re.fullmatch(str(asks[1]["regex"]), texts[1])
    assert texts[2] in asks[2]["choice"]
    assert re.fullmatch(r"In 1[89][0-9]{2}, [a-z ]{5,40}\.", texts[3])
    assert [stream_text(redis_client, job.id) for job in jobs[:4]] == texts
    assert refused.status == "failed" and refused.error is not None
    assert (refused.error.code, refused.error.param) == (ErrorCode.INVALID_REQUEST, "regex")
    assert "unclosed group" in refused.error.message


def test_a_job_handed_over_in_the_middle_of_its_grammar_ends_with_the_same_answer(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    model = str(make_tiny_model("llama", tmp_path))
    item = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99_999}, {"enum": ["alpha", "omega"]}]}
    schema = {"type": "array", "items": item, "minItems": 120, "maxItems": 120}  # long enough to be cut
    fields = {"prompt": "list", "max_tokens": 800, "seed": 5, "n": 2, "response_format": schema_format(schema)}
    whole = queue.enqueue(FUNCTION, **fields)
    with worker_on(redis_url, model) as first:
        expected = wait_for_result(redis_client, whole.id)
        first.service._loop._committer.build = lambda job: None  # however slow this test is, it does not end the job
        first.service._loop._committer.commit = lambda jobs: None
        cut = queue.enqueue(FUNCTION, **fields)
        wait_until(lambda: redis_client.xlen(keys.stream_key(cut.id)) > 2)
    with worker_on(redis_url, model):
        result = wait_for_result(redis_client, cut.id)
    assert result.attempts == 2
    assert [choice.token_ids for choice in result.choices] == [choice.token_ids for choice in expected.choices]
    assert [choice.finish_reason for choice in result.choices] == [choice.finish_reason for choice in expected.choices]
