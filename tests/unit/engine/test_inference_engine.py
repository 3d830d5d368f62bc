"""The engine's own interface, with an echoing core on a thread of this process."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine import (
    EngineInfo,
    EngineNotRunningError,
    InferenceEngine,
    InvalidRequestError,
    ModelLoadError,
    SamplingParams,
)
from engine.supervisor import Supervisor
from tests.fakes.echo_engines import ENDLESS, echo_engine
from tests.fakes.fake_core import VOCAB_SIZE
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.waiting import eventually


def echo(engine: InferenceEngine, prompt: str, num_tokens: int, choice: int = 0) -> str:
    ids = engine.tokenizer.encode(prompt)
    return engine.tokenizer.decode([ids[(i + choice) % len(ids)] for i in range(num_tokens)])


def test_generate_returns_the_answers_text(engine: InferenceEngine) -> None:
    text = engine.generate("the quick brown fox 你好 😀", SamplingParams(max_tokens=40))
    assert text == echo(engine, "the quick brown fox 你好 😀", 40).rstrip("\ufffd")


def test_a_prompt_may_be_token_ids(engine: InferenceEngine) -> None:
    ids = engine.tokenizer.encode("hello world")
    assert engine.generate(ids, SamplingParams(max_tokens=len(ids))) == "hello world"


def test_a_batch_is_ordered_by_prompt_and_choice(engine: InferenceEngine) -> None:
    prompts = ["hello world", "the lazy dog", "the quick brown fox"]
    outputs = engine.generate_batch(prompts, SamplingParams(max_tokens=9, n=2))
    assert [output.index for output in outputs] == [0, 1] * 3
    assert [output.text for output in outputs] == [echo(engine, p, 9, choice) for p in prompts for choice in (0, 1)]
    assert all(output.finished and output.finish_reason == "length" for output in outputs)
    assert [len(output.token_ids) for output in outputs] == [9] * 6
    assert len({output.request_id for output in outputs}) == 3


def test_a_batch_takes_one_params_for_each_prompt(engine: InferenceEngine) -> None:
    each = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)]
    outputs = engine.generate_batch(["hello world", "hello world"], each)
    assert [len(output.token_ids) for output in outputs] == [2, 3]


def test_an_empty_batch_has_no_outputs(engine: InferenceEngine) -> None:
    assert engine.generate_batch([]) == []


def test_a_stream_left_with_its_loop_is_no_failure(engine: InferenceEngine, caplog: pytest.LogCaptureFixture) -> None:
    async def read_one_piece() -> None:
        async for _ in engine.generate_stream("hello", ENDLESS):
            return

    for _ in range(20):
        asyncio.run(read_one_piece())
    engine.generate("hello", SamplingParams(max_tokens=1))
    assert "callback_failed" not in caplog.text


def test_stop_strings_end_the_answer_and_free_its_sequence(engine: InferenceEngine) -> None:
    (output,) = engine.generate_batch(["the quick brown fox"], SamplingParams(stop=("xthe q", "nope")))
    assert (output.text, output.finish_reason) == ("the quick brown fo", "stop")
    assert engine.get_stats()["num_kv_blocks_used"] == 0


def test_tokens_past_the_stop_in_the_same_step_are_dropped(tmp_path: Path) -> None:
    with echo_engine(tmp_path, tokens_per_step=50) as engine:
        (output,) = engine.generate_batch(["the quick brown fox"], SamplingParams(stop=("brown",)))
        said, said_before = (engine.tokenizer.decode(ids) for ids in (output.token_ids, output.token_ids[:-1]))
    assert output.text == "the quick "
    assert "brown" in said and "brown" not in said_before


async def test_generate_async_equals_generate(engine: InferenceEngine) -> None:
    params = SamplingParams(max_tokens=12)
    texts = await asyncio.gather(*[engine.generate_async(f"hello {i}", params) for i in range(5)])
    assert texts == [echo(engine, f"hello {i}", 12) for i in range(5)]


async def test_a_streams_pieces_join_to_the_answer(engine: InferenceEngine) -> None:
    prompt = "the 你好 😀 fox"
    pieces = [text async for text in engine.generate_stream(prompt, SamplingParams(max_tokens=30))]
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == echo(engine, prompt, 30).rstrip("\ufffd")


async def test_closing_a_stream_aborts_its_request(engine: InferenceEngine) -> None:
    stream = engine.generate_stream("hello world", ENDLESS)
    assert await anext(stream)
    assert engine.get_stats()["num_requests"] == 1
    await stream.aclose()
    assert engine.get_stats()["num_requests"] == 0
    assert engine.get_stats()["num_kv_blocks_used"] == 0


@pytest.mark.parametrize("kind", ["generate_async", "generate_stream"])
async def test_cancelling_the_task_aborts_its_request(engine: InferenceEngine, kind: str) -> None:
    began = asyncio.Event()

    async def read() -> None:
        async for _ in engine.generate_stream("hello world", ENDLESS):
            began.set()

    async def wait() -> None:
        began.set()
        await engine.generate_async("hello world", ENDLESS)

    task = asyncio.create_task(read() if kind == "generate_stream" else wait())
    await began.wait()
    await eventually(lambda: engine.get_stats()["num_requests"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.get_stats()["num_requests"] == 0


def test_several_threads_and_event_loops_share_one_engine(engine: InferenceEngine) -> None:
    async def stream(prompt: str) -> str:
        return "".join([text async for text in engine.generate_stream(prompt, SamplingParams(max_tokens=15))])

    def work(number: int) -> bool:
        prompt = f"the fox {number}"
        expected = echo(engine, prompt, 15)
        return asyncio.run(stream(prompt)) == expected == engine.generate(prompt, SamplingParams(max_tokens=15))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_submitted_requests_call_back_in_order_from_one_thread(engine: InferenceEngine) -> None:
    threads: set[int] = set()
    recorder = OutputRecorder()

    def on_output(output: Any) -> None:
        threads.add(threading.get_ident())
        recorder(output)

    ids = engine.tokenizer.encode("hello world")
    engine.submit("job-1", ids, SamplingParams(max_tokens=7), on_output=on_output)
    last = recorder.wait_for_end()
    assert [output.token_offset for output in recorder.outputs] == list(range(7))
    assert (last.request_id, last.index, last.finish_reason) == ("job-1", 0, "length")
    assert last.num_cached_tokens == 1
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_abort_ends_every_choice_as_cancelled_with_what_was_held_back(engine: InferenceEngine) -> None:
    recorder = OutputRecorder()
    ids = engine.tokenizer.encode("hello")
    engine.submit("job-1", ids, SamplingParams(n=3, stop=("never",)), on_output=recorder)
    recorder.wait_for_tokens(30)
    engine.abort("job-1")
    recorder.wait_for_end()
    endings = [output for output in recorder.outputs if output.finish_reason]
    assert sorted(output.index for output in endings) == [0, 1, 2]
    assert {output.finish_reason for output in endings} == {"cancelled"}
    assert engine.get_stats()["num_kv_blocks_used"] == 0


def test_a_callback_may_abort_its_own_request(engine: InferenceEngine) -> None:
    recorder = OutputRecorder()

    def on_output(output: Any) -> None:
        if not output.finished:
            engine.abort("job-1")
        recorder(output)

    engine.submit("job-1", [5], ENDLESS, on_output=on_output)
    assert recorder.wait_for_end().finish_reason == "cancelled"


def test_an_id_in_use_is_refused_until_its_request_has_ended(engine: InferenceEngine) -> None:
    first, second = OutputRecorder(), OutputRecorder()
    engine.submit("job-1", [5], ENDLESS, on_output=first)
    with pytest.raises(InvalidRequestError, match="in use") as caught:
        engine.submit("job-1", [5], ENDLESS, on_output=second)
    assert caught.value.param == "request_id"
    engine.abort("job-1")
    first.wait_for_end()
    engine.submit("job-1", [5], SamplingParams(max_tokens=1), on_output=second)
    assert second.wait_for_end().finish_reason == "length"


def test_a_prompt_that_the_core_refuses_fails_alone(tmp_path: Path) -> None:
    with echo_engine(tmp_path, refused=7) as engine:
        refused, sound = engine.generate_batch([[7, 8], [8, 7]], SamplingParams(max_tokens=2))
    assert (refused.finish_reason, refused.error_kind, refused.error) == ("error", "refused", "this prompt is refused")
    assert sound.finish_reason == "length"


def test_an_engine_that_does_not_run_says_so(tmp_path: Path) -> None:
    engine = echo_engine(tmp_path)
    assert not engine.is_healthy
    with pytest.raises(EngineNotRunningError, match=r"call start\(\)"):
        engine.generate("hello")
    engine.stop()
    with engine:
        assert engine.is_healthy
    with pytest.raises(EngineNotRunningError):
        engine.get_stats()


def test_start_and_stop_may_be_called_twice_and_again(tmp_path: Path) -> None:
    engine = echo_engine(tmp_path)
    for _ in range(2):
        engine.start()
        engine.start()
        assert engine.generate("hello", SamplingParams(max_tokens=1)) == "hello"
        engine.stop()
        engine.stop()


def test_a_start_that_another_thread_stopped_leaves_the_next_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = echo_engine(tmp_path)
    wait = Supervisor.wait_until_ready

    def wait_while_others_stop_and_launch(supervisor: Supervisor) -> EngineInfo:
        monkeypatch.undo()
        engine.stop()
        engine.launch()
        return wait(supervisor)

    monkeypatch.setattr(Supervisor, "wait_until_ready", wait_while_others_stop_and_launch)
    with suppress(EngineNotRunningError):
        engine.start()
    launched = engine._supervisor
    with engine:
        assert launched is not None and engine._supervisor is launched


def test_stop_ends_the_requests_under_way(tmp_path: Path) -> None:
    recorder = OutputRecorder()
    with echo_engine(tmp_path) as engine:
        engine.submit("job-1", [5], ENDLESS, on_output=recorder)
        recorder.wait_for_tokens(3)
    last = recorder.outputs[-1]
    assert (last.finished, last.finish_reason, last.error_kind) == (True, "error", "stopped")


def test_a_model_that_cannot_be_loaded_is_reported_with_its_reason(tmp_path: Path) -> None:
    engine = echo_engine(tmp_path, refused_start=1)
    with pytest.raises(ModelLoadError, match="holds no weights: fetch the model again"):
        engine.start()
    assert not engine.is_healthy


def test_a_folder_without_tokenizer_is_reported(tmp_path: Path) -> None:
    engine = echo_engine(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing"):
        engine.start()


def test_stats_and_info_tell_what_runs(engine: InferenceEngine) -> None:
    recorder = OutputRecorder()
    engine.submit("job-1", [5], SamplingParams(n=2), on_output=recorder)
    recorder.wait_for_tokens(1)
    stats = engine.get_stats()
    assert (stats["num_requests"], stats["num_running"], stats["num_restarts"]) == (1, 2, 0)
    assert (stats["num_kv_blocks_used"], stats["num_kv_blocks_free"]) == (2, 998)
    assert stats["num_steps"] > 0
    assert engine.info.vocab_size == VOCAB_SIZE
    assert engine.last_step_at > 0


def test_the_parents_half_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, engine; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'engine.core')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
