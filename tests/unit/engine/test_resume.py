"""A request that is cut anywhere and resumed gives the tokens and the text of the uncut one."""

from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import InferenceEngine, InvalidRequestError, SamplingParams
from engine.outputs import RequestOutput
from tests.fakes.child_thread import ChildThread
from tests.fakes.fake_core import CORE_PATH, VOCAB_SIZE, write_fake_model
from tests.fakes.output_recorder import OutputRecorder

TEXT = "the quick brown fox 你好 😀 the END"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_fake_model(tmp_path_factory.mktemp("resume"), max_model_len=60)
    with InferenceEngine(folder, _start_child=partial(ChildThread, core_path=CORE_PATH)) as engine:
        yield engine


class Answer:
    """What one choice got, replay apart."""

    def __init__(self, outputs: list[RequestOutput], index: int) -> None:
        mine = [output for output in outputs if output.index == index]
        self.replays = [output for output in mine if output.is_replay]
        self.token_ids = [token_id for output in mine for token_id in output.token_ids]
        self.text = "".join(output.text for output in mine)
        self.finish_reason = mine[-1].finish_reason
        offsets = [output.token_offset for output in mine if output.token_ids]
        assert offsets == sorted(offsets) and (not offsets or offsets[0] == 0)
        assert mine[: len(self.replays)] == self.replays, "a replay comes first"

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Answer)
        mine, theirs = ((a.token_ids, a.text, a.finish_reason) for a in (self, other))
        return mine == theirs


def submit(
    engine: InferenceEngine, prompt: list[int], params: SamplingParams, output: list[list[int]]
) -> OutputRecorder:
    recorder = OutputRecorder()
    engine.submit(uuid4().hex, prompt, params, output_token_ids=output, on_output=recorder)
    return recorder


def answers(recorder: OutputRecorder, n: int) -> list[Answer]:
    recorder.wait_for_end()
    assert sum(output.finished for output in recorder.outputs) == 1
    return [Answer(recorder.outputs, index) for index in range(n)]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, len(TEXT) - 1),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 30) | st.none(),
    stop=st.sampled_from([(), ("fox 你",), ("never", "好 😀 t"), ("x", "END the q"), ("e",)]),
    stop_token=st.sampled_from(["", "END", "fox"]),
)
def test_a_request_cut_at_any_token_gives_the_same_tokens_and_text(
    engine: InferenceEngine, start: int, n: int, max_tokens: int | None, stop: tuple[str, ...], stop_token: str
) -> None:
    prompt = engine.tokenizer.encode(TEXT[start:])
    stop_token_ids = tuple(engine.tokenizer.encode(stop_token)[:1]) if stop_token else ()
    params = SamplingParams(max_tokens=max_tokens, n=n, stop=stop, stop_token_ids=stop_token_ids)
    uncut = answers(submit(engine, prompt, params, []), n)
    cuts = [
        [answer.token_ids[: cut + skew * i] for i, answer in enumerate(uncut)] for cut in range(61) for skew in (0, 2)
    ]
    recorders = [submit(engine, prompt, params, output) for output in cuts]
    for output, recorder in zip(cuts, recorders, strict=True):
        resumed = answers(recorder, n)
        assert resumed == uncut
        for answer, stored in zip(resumed, output, strict=True):
            assert [replay.token_ids for replay in answer.replays] == ([stored] if stored else [])


def test_a_request_whose_choices_are_all_complete_ends_without_the_child(engine: InferenceEngine) -> None:
    prompt = engine.tokenizer.encode("hello world")
    params = SamplingParams(max_tokens=4, n=2)
    uncut = answers(submit(engine, prompt, params, []), 2)
    recorder = submit(engine, prompt, params, [answer.token_ids for answer in uncut])
    recorder.wait_for_end()
    assert [(output.is_replay, output.finished) for output in recorder.outputs] == [(True, False), (True, True)]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ([[1], [2], [3]], "3 lists, but n is 2"),
        ([[1], [2, VOCAB_SIZE]], rf"output_token_ids\[1\] holds token id {VOCAB_SIZE}"),
        ([[-1]], r"output_token_ids\[0\] holds token id -1"),
        ([5], r"output_token_ids\[0\] must be a list"),
        ([["5"]], r"output_token_ids\[0\] must be a list"),
        ("55", "must be a list"),
    ],
)
def test_tokens_that_cannot_be_resumed_are_refused_by_name(
    engine: InferenceEngine, output: list[list[int]], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refusal:
        engine.submit("r", [5], SamplingParams(n=2), output_token_ids=output, on_output=OutputRecorder())
    assert refusal.value.param == "output_token_ids"


@pytest.mark.parametrize(
    ("field", "value"),
    [("deadline", float("nan")), ("deadline", "soon"), ("deadline", True), ("priority", 2**70), ("priority", 0.5)],
)
def test_an_order_that_cannot_be_kept_is_refused_by_name(engine: InferenceEngine, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as refusal:
        engine.submit("r", [5], SamplingParams(), on_output=OutputRecorder(), **{field: value})
    assert refusal.value.param == field
