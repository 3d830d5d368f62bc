"""The command `submit` against a real Redis and a fake worker: what it sends, and what it prints of the answer."""

import json

import pytest

from producer.contract import Result
from tests.fakes.command_line import Invoke
from tests.fakes.fake_embeddings import expected_vector
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.worker_runs import WorkerThread


def test_submit_prints_the_answer_and_nothing_else(promptmill: Invoke, worker: FakeWorker) -> None:
    with worker.serving(echo):
        result = promptmill("submit", "one two three", "--max-tokens", "2", "--temperature", "0")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "one two \n", "")


def test_submit_sends_a_chat_with_every_option(promptmill: Invoke, worker: FakeWorker, redis_url: str) -> None:
    arguments = ["--system", "Be brief.", "--model", "fake", "--top-p", "0.5", "--top-k", "4", "--min-p", "0.1"]
    arguments += ["--seed", "7", "--stop", "a", "--stop", "b", "--ignore-eos", "--n", "2", "--priority-class", "high"]
    detached = promptmill("submit", "-", "--detach", *arguments, input="from standard input")
    assert detached.exit_code == 0
    high = FakeWorker(redis_url, queue="promptmill:high")
    held = high.claim()
    assert held.job_id == detached.stdout.strip()
    assert held.arguments == {
        "v": 1,
        "model": "fake",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "from standard input"},
        ],
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "n": 2,
    }
    high.close()


@pytest.mark.parametrize(("named", "queue"), [("Normal", "promptmill@acme"), ("low", "promptmill:low@acme")])
def test_submit_takes_classes_and_tenants_as_run_does(
    promptmill: Invoke, redis_url: str, named: str, queue: str
) -> None:
    assert promptmill("submit", "x", "--detach", "--priority-class", named, "--tenant", "acme").exit_code == 0
    with FakeWorker(redis_url, queue=queue) as worker:
        assert worker.claim().arguments["tenant"] == "acme"


def test_standard_input_that_is_no_utf_8_is_refused(promptmill: Invoke, redis_url: str) -> None:
    result = promptmill("submit", "-", input=b"caf\xe9")
    assert result.exit_code == 2 and "standard input is not UTF-8" in result.stderr


def test_submit_asks_for_penalties_and_logprobs(promptmill: Invoke, worker: FakeWorker) -> None:
    options = "--min-tokens 2 --presence-penalty 0.5 --frequency-penalty 0.25 --repetition-penalty 1.5 --logprobs 3"
    promptmill("submit", "x", "--raw", "--detach", *options.split())
    fields = {"min_tokens": 2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}
    assert worker.claim().arguments == {"v": 1, "prompt": "x", "logprobs": True, "top_logprobs": 3, **fields}
    assert promptmill("submit", "x", "--logprobs", "3").exit_code == 2


def test_submit_can_leave_the_chat_template_out(promptmill: Invoke, worker: FakeWorker) -> None:
    promptmill("submit", "as it is", "--raw", "--detach")
    assert worker.claim().arguments == {"v": 1, "prompt": "as it is"}
    assert promptmill("submit", "x", "--raw", "--system", "y").exit_code == 2


def test_a_streamed_submit_prints_the_same_text(promptmill: Invoke, worker: FakeWorker) -> None:
    with worker.serving(echo):
        result = promptmill("submit", "one two three", "--stream")
    assert (result.exit_code, result.stdout) == (0, "one two three \n")
    assert promptmill("submit", "x", "--stream", "--n", "2").exit_code == 2


def test_json_is_the_result_and_with_stream_the_chunks_before_it(promptmill: Invoke, worker: FakeWorker) -> None:
    with worker.serving(echo):
        plain = promptmill("submit", "one two", "--json")
        streamed = promptmill("submit", "one two", "--json", "--stream")
    result = json.loads(plain.stdout)
    assert (result["status"], result["choices"][0]["text"]) == ("finished", "one two ")
    *chunks, last = [json.loads(line) for line in streamed.stdout.splitlines()]
    assert [chunk["text"] for chunk in chunks] == ["one ", "two "]
    assert last["status"] == "finished"
    again = promptmill("result", result["job_id"], "--json")
    assert json.loads(again.stdout) == result
    assert promptmill("result", result["job_id"]).stdout == "one two \n"


def test_several_answers_are_told_apart(promptmill: Invoke, worker: FakeWorker) -> None:
    with worker.serving(echo):
        assert promptmill("submit", "one", "--n", "2").stdout == "[0] one \n[1] one \n"


def test_a_failed_job_is_one_line_and_exit_code_1(promptmill: Invoke, worker: FakeWorker) -> None:
    with worker.serving(echo):
        result = promptmill("submit", "fail", "--raw")
        streamed = promptmill("submit", "fail", "--raw", "--stream")
        as_json = promptmill("submit", "fail", "--raw", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "told to fail" in result.stderr
    assert (streamed.exit_code, streamed.stdout) == (1, "fail \n")
    assert (as_json.exit_code, json.loads(as_json.stdout)["status"]) == (1, "failed")


def test_submit_prints_an_embedding(promptmill: Invoke, worker_thread: WorkerThread) -> None:
    token_ids = FakeTokenizer().encode("the mill")
    plain = promptmill("submit", "the mill", "--embed")
    assert (plain.exit_code, json.loads(plain.stdout)) == (0, expected_vector(token_ids).tolist())
    cut = promptmill("submit", "-", "--embed", "--dimensions", 3, "--json", input="the mill")
    assert Result.model_validate_json(cut.stdout).vectors == [expected_vector(token_ids, 3).tolist()]
    job_id = promptmill("submit", "the mill", "--embed", "--detach", "--model", "fake").stdout.strip()
    assert promptmill("result", job_id).stdout == plain.stdout


def test_a_submit_whose_time_is_over_leaves_its_job_running(promptmill: Invoke, worker: FakeWorker) -> None:
    for options in ([], ["--stream"]):
        result = promptmill("submit", "one", "--timeout", "0.05", *options)
        assert result.exit_code == 1 and "was cancelled" not in result.stderr
        assert not worker.claim().is_cancelled()


def test_a_job_whose_queue_nobody_drains_says_so(promptmill: Invoke, worker: FakeWorker) -> None:
    result = promptmill("submit", "x", "--timeout", "0.05", "--queue", "nobody@acme")
    assert "no live worker drains the queue 'nobody'" in result.stderr
    assert "drains" not in promptmill("submit", "x", "--timeout", "0.05", "--tenant", "acme").stderr
