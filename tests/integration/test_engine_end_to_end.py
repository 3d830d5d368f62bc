"""The whole engine: parent, child process and a model, on CPU."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import InferenceEngine, InvalidRequestError, ModelLoadError, SamplingParams
from tests.fakes.child_thread import ChildThread
from tests.fakes.echo_engines import child_pid, wait_for_restarts
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)

PROMPTS = [f"prompt number {i}: " + "word " * i for i in range(8)]
SAMPLED = SamplingParams(max_tokens=200, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    """A tiny random llama under a budget and a pool that force chunks and preemptions."""
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    with InferenceEngine(
        str(folder), max_num_seqs=8, max_num_tokens=48, num_kv_blocks=64, num_threads=1, device="cpu", dtype="float32"
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def demo() -> Iterator[InferenceEngine]:
    with InferenceEngine("smollm2-135m", num_threads=1, device="cpu") as engine:
        yield engine


def run_and_kill(
    engine: InferenceEngine, prompts: list[list[int]], params: SamplingParams, after: int
) -> list[list[int]]:
    """The output tokens of a run whose child is killed once every prompt has `after` of them."""
    num_restarts = engine.get_stats()["num_restarts"]
    recorders = [OutputRecorder() for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(f"killed-{i}", prompt, params, on_output=recorders[i])
    for recorder in recorders:
        recorder.wait_for_tokens(after)
    os.kill(child_pid(engine), signal.SIGKILL)
    for recorder in recorders:
        assert recorder.wait_for_end().finish_reason in ("length", "stop")
    wait_for_restarts(engine, num_restarts + 1)
    return [recorder.token_ids for recorder in recorders]


def assert_all_blocks_free(engine: InferenceEngine) -> None:
    stats = engine.get_stats()
    assert (stats["num_requests"], stats["num_running"], stats["num_waiting"]) == (0, 0, 0)
    assert (stats["num_kv_blocks_used"], stats["num_kv_blocks_free"]) == (0, stats["num_kv_blocks"])


def test_a_child_killed_in_mid_generation_leaves_sampled_outputs_as_they_would_have_been(
    engine: InferenceEngine,
) -> None:
    undisturbed = engine.generate_batch(PROMPTS, SAMPLED)
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert run_and_kill(engine, prompts, SAMPLED, after=20) == [output.token_ids for output in undisturbed]
    assert_all_blocks_free(engine)


ASKING = SamplingParams(
    max_tokens=150,
    temperature=0.9,
    n=2,
    seed=3,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias=((65, 2.0), (66, -100.0)),
    min_tokens=40,
    logprobs=2,
    prompt_logprobs=1,
)


def test_a_child_killed_in_mid_generation_changes_no_logprob_and_reports_the_prompts_once(
    engine: InferenceEngine,
) -> None:
    undisturbed = engine.generate_batch(PROMPTS, ASKING)
    for number, output in enumerate(undisturbed):
        assert output.logprobs is not None and [entry.token_id for entry in output.logprobs] == output.token_ids
        assert (output.prompt_logprobs is None) is (output.index == 1)
        assert len(output.token_ids) > 40 and 66 not in output.token_ids, f"choice {number}"
    recorders = [OutputRecorder() for _ in PROMPTS]
    for prompt, recorder in zip(PROMPTS, recorders, strict=True):
        engine.submit(f"asking-{prompt}", engine.tokenizer.encode(prompt), ASKING, on_output=recorder)
    for recorder in recorders:
        recorder.wait_for_tokens(40)
    os.kill(child_pid(engine), signal.SIGKILL)
    for number, recorder in enumerate(recorders):
        recorder.wait_for_end()
        for index in (0, 1):
            mine = [output for output in recorder.outputs if output.index == index]
            whole = undisturbed[2 * number + index]
            assert [entry for output in mine for entry in output.logprobs or ()] == whole.logprobs
            assert [o.prompt_logprobs for o in mine if o.prompt_logprobs] == [
                scores for scores in [whole.prompt_logprobs] if scores
            ]
    assert_all_blocks_free(engine)


def test_a_prompt_is_scored_without_a_token(engine: InferenceEngine) -> None:
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=3, logprobs=0)
    (scored,) = engine.generate_batch(["hello there"], scoring)
    (generated,) = engine.generate_batch(["hello there"], SamplingParams(max_tokens=3, prompt_logprobs=3))
    assert (scored.text, scored.token_ids, scored.logprobs, scored.finish_reason) == ("", [], [], "length")
    assert scored.prompt_logprobs == generated.prompt_logprobs is not None
    assert_all_blocks_free(engine)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", ((320, 1.0),)),
        ("stop_token_ids", (320,)),
        ("stop_token_ids", (10**30,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_token_that_the_model_lacks_is_refused(engine: InferenceEngine, param: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{param} holds token id ") as caught:
        engine.generate("hello", SamplingParams(**{param: value}))
    assert caught.value.param == param


@pytest.mark.parametrize("top_k", [2**31, 2**63, 10**30])
def test_a_top_k_above_any_vocabulary_is_all_tokens(engine: InferenceEngine, top_k: int) -> None:
    sampled = SamplingParams(max_tokens=8, seed=4, ignore_eos=True)
    expected = engine.generate("hello", sampled)
    assert engine.generate("hello", replace(sampled, top_k=top_k)) == expected
    assert_all_blocks_free(engine)


def test_seeded_choices_differ_from_each_other_and_repeat(engine: InferenceEngine) -> None:
    params = SamplingParams(max_tokens=24, n=3, seed=9, ignore_eos=True)
    first, second = engine.generate_batch([PROMPTS[2]], params), engine.generate_batch(PROMPTS, params)[6:9]
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert len({tuple(output.token_ids) for output in first}) == 3


def test_a_stop_string_ends_the_answer_before_it(engine: InferenceEngine) -> None:
    greedy = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    (whole,) = engine.generate_batch(["hello"], greedy)
    stop = next(whole.text[i : i + 2] for i in range(20, 100) if whole.text[i : i + 2].isascii())
    (stopped,) = engine.generate_batch(
        ["hello"], SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True, stop=(stop,))
    )
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert_all_blocks_free(engine)


async def test_a_streams_pieces_join_to_the_answer(engine: InferenceEngine) -> None:
    pieces = [text async for text in engine.generate_stream("hello", SAMPLED)]
    assert len(pieces) > 10
    assert "".join(pieces) == engine.generate("hello", SAMPLED)


async def test_abandoned_requests_free_their_blocks(engine: InferenceEngine) -> None:
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    stream = engine.generate_stream("hello", endless)
    await anext(stream)
    task = asyncio.create_task(engine.generate_async("hello again", endless))
    await asyncio.sleep(0)
    await stream.aclose()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_all_blocks_free(engine)


def test_an_endless_answer_ends_where_the_context_does(engine: InferenceEngine) -> None:
    prompt = engine.tokenizer.encode("hello " * 160)  # most of the way is prefilled
    (output,) = engine.generate_batch([prompt], SamplingParams(temperature=0.0, ignore_eos=True))
    assert output.finish_reason == "length"
    assert len(prompt) + len(output.token_ids) == engine.info.max_model_len


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=str(tmp_path)):
        InferenceEngine(str(tmp_path), device="cpu").start()
    with pytest.raises(ModelLoadError, match="does not exist"):
        InferenceEngine(str(tmp_path / "nowhere.gguf"), device="cpu", _start_child=ChildThread).start()


QUESTION = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"  # as its template renders it
)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0)


def rendered(engine: InferenceEngine, text: str) -> list[int]:
    return engine.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.model
def test_the_demo_model_knows_the_capital_of_france(demo: InferenceEngine) -> None:
    (output,) = demo.generate_batch([rendered(demo, QUESTION)], GREEDY)
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
    assert "<|im_end|>" not in output.text


@pytest.mark.model
async def test_the_demo_models_stream_stops_at_a_stop_string(demo: InferenceEngine) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, stop=("France is Par",))
    pieces = [text async for text in demo.generate_stream(rendered(demo, QUESTION), params)]
    assert "".join(pieces) == "The capital of "
    assert_all_blocks_free(demo)
