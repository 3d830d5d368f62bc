"""What is wrong with a batch's file, by line; and which queue its jobs go to."""

import io
import json
from contextlib import nullcontext
from typing import Any

import pytest

from producer.batch.line_index import LineIndex
from producer.contract import WorkerInfo, keys
from producer.gateway.batches.batch_record import BatchProblem, BatchRecord, BatchStatus
from producer.gateway.batches.input_check import (
    MAX_INPUTS,
    MAX_LINES,
    MAX_PROBLEMS,
    EndOfCheckError,
    InputCheck,
    choose_batch_queue,
)
from producer.openai.embeddings import EMBEDDINGS_URL
from tests.fakes.batches import URL, jsonl, line

RECORD = BatchRecord(
    id="batch_1",
    key_id=None,
    tenant=None,
    endpoint=URL,
    input_file_id="file-1",
    metadata=None,
    output_expires_after=None,
    created_at=1,
    expires_at=2,
    status=BatchStatus.VALIDATING,
)


def check(data: bytes) -> InputCheck:
    made = InputCheck(RECORD, lambda: False)
    try:
        LineIndex(io.BytesIO(data), max_line_bytes=1000).scan(made.see)
    except EndOfCheckError:
        assert made.problems
    return made


def problems(*lines: Any) -> list[BatchProblem]:
    return check(jsonl(lines)).problems


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{broken", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (line(""), "missing_custom_id", "custom_id"),
        (line("x" * 513), "missing_custom_id", "custom_id"),
        (line("good"), "duplicate_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", url="/v1/images"), "invalid_url", "url"),
        (line("b", url="/v1/chat/completions"), "url_mismatch", "url"),
        ({**line("b"), "body": "text"}, "invalid_body", "body"),
        ({**line("b"), "body": {"prompt": "x"}}, "missing_model", "body.model"),
        (line("b", body={"model": 7}), "missing_model", "body.model"),
        (line("b", body={"model": "other"}), "mismatched_model", "body.model"),
        (line("b", "p" * 2000), "line_too_long", None),
    ],
)
def test_a_bad_line_is_named_by_its_number_its_code_and_its_field(bad: Any, code: str, param: str | None) -> None:
    raw = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    found = check(jsonl([line("good")]) + b"\n" + raw + b"\n" + jsonl([line("last")])).problems
    assert [(problem.line, problem.code, problem.param) for problem in found] == [(3, code, param)]
    assert found[0].message


def test_a_good_file_has_no_problem_and_one_model() -> None:
    good = check(b"\n\n" + jsonl([line("a"), line("b", body={"temperature": 99})]))
    assert good.problems == [] and good.model == "fake"


@pytest.mark.parametrize("data", [b"", b"\n\n  \n"])
def test_a_file_without_lines_is_refused(data: bytes) -> None:
    [problem] = check(data).problems
    assert (problem.code, problem.line, problem.param) == ("empty_file", None, "input_file_id")


def test_only_so_many_problems_are_listed_and_the_rest_is_not_read() -> None:
    found = problems(*({"custom_id": str(number)} for number in range(MAX_PROBLEMS * 2)))
    assert [problem.line for problem in found] == list(range(1, MAX_PROBLEMS + 1))


def test_a_file_of_too_many_lines_is_refused_as_a_whole() -> None:
    made = InputCheck(RECORD, lambda: False)
    made._num_lines = MAX_LINES - 1
    LineIndex(io.BytesIO(jsonl([line("last")]))).scan(made.see)
    assert made.problems == []
    with pytest.raises(EndOfCheckError):
        LineIndex(io.BytesIO(jsonl([line("too many")]))).scan(made.see)
    [problem] = made.problems
    assert problem.code == "too_many_lines" and "50000" in problem.message


def test_a_file_of_too_many_inputs_to_embed_is_refused_as_a_whole() -> None:
    """A text is one, and so is a list of token ids; a list of either counts as many as it has."""
    record = RECORD.model_copy(update={"endpoint": EMBEDDINGS_URL})
    texts, both = ["a"] * (MAX_INPUTS - 3), ["a", [7, 8]]
    given = [texts, "b", [5] * MAX_INPUTS]
    for last, is_refused in (("c", False), (both, True)):
        made = InputCheck(record, lambda: False)
        bodies = [{"model": "fake", "input": value} for value in [*given, last]]
        lines = [line(str(at), url=EMBEDDINGS_URL, body=body) for at, body in enumerate(bodies)]
        with pytest.raises(EndOfCheckError) if is_refused else nullcontext():
            LineIndex(io.BytesIO(jsonl(lines))).scan(made.see)
        refusals = [(problem.code, problem.line, problem.param) for problem in made.problems]
        assert refusals == [("too_many_inputs", None, "input_file_id")] * is_refused
    assert "has more than 50000 inputs to embed" in made.problems[0].message


def test_a_check_that_nobody_wants_any_more_ends() -> None:
    made = InputCheck(RECORD, lambda: True)
    with pytest.raises(EndOfCheckError):
        LineIndex(io.BytesIO(jsonl([line("a"), line("b")]))).scan(made.see)


def worker(*queues: str) -> WorkerInfo:
    return WorkerInfo(
        name="w",
        queues=list(queues),
        models=["fake"],
        context_length=1,
        device="cpu",
        hostname="h",
        pid=1,
        started_at=0.0,
    )


def test_jobs_go_to_the_low_class_of_the_queue_on_which_the_model_is_served() -> None:
    classes = keys.class_queues("gpu")
    assert choose_batch_queue([worker(*classes)], "fake", "promptmill", None) == "gpu:low"
    assert choose_batch_queue([worker(*classes)], "fake", "promptmill", "acme") == "gpu:low@acme"
    assert choose_batch_queue([worker("gpu")], "fake", "promptmill", None) == "gpu"  # nobody drains its low class
    assert choose_batch_queue([worker(*classes)], "other", "promptmill", None) is None
    assert choose_batch_queue([], "other", "promptmill", None) == "promptmill:low"  # a worker may yet come
