"""What the engine's public calls refuse: the argument by its name, and the reason; what of them its child is told."""

from dataclasses import replace
from typing import Any

import pytest

from engine import (
    ContextLengthError,
    EngineConfig,
    InferenceEngine,
    InvalidRequestError,
    SamplingParams,
)
from engine.messages import AddSequence
from engine.prompt_reader import PromptReader
from tests.fakes.echo_engines import ENDLESS
from tests.fakes.fake_core import VOCAB_SIZE, FakeCore
from tests.fakes.output_recorder import OutputRecorder


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        (7, "text or a list of token ids"),
        (None, "text or a list of token ids"),
        (["hello"], "text or a list of token ids"),
        ([1, 2.0], "text or a list of token ids"),
        ([True], "text or a list of token ids"),
        ([5, VOCAB_SIZE], f"token id {VOCAB_SIZE}"),
        ([-1], "token id -1"),
        ("lone \ud83d", "surrogate"),
    ],
)
def test_a_bad_prompt_is_refused_by_name(engine: InferenceEngine, prompt: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        engine.generate(prompt)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match=reason):
        engine.generate_batch(["fine", prompt])


def test_the_prompt_at_fault_in_a_batch_is_named_by_its_place_and_nothing_runs(engine: InferenceEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompts\[1\]: prompt is empty"):
        engine.generate_batch(["fine", ""])
    with pytest.raises(InvalidRequestError, match="prompts must be a list"):
        engine.generate_batch("one text")
    assert engine.get_stats()["num_steps"] == 0


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(engine: InferenceEngine) -> None:
    with pytest.raises(ContextLengthError, match="5000 tokens, but the context holds 5000") as caught:
        engine.submit("job-1", [5] * 5000, ENDLESS, on_output=OutputRecorder())
    assert caught.value.param == "prompt"


def test_a_prompt_longer_than_the_cache_is_told_what_to_raise(engine: InferenceEngine) -> None:
    reader = PromptReader(engine.tokenizer, replace(engine.info, max_model_len=16, is_bound_by_cache=True))
    with pytest.raises(ContextLengthError, match=r"the KV cache holds 16 .* or raise num_kv_blocks"):
        reader.check([5] * 16)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias"),
        ({"logit_bias": ((-1, 2.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1,),)}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"seed": None}, "seed"),
        ({"stop": "text"}, "stop"),
        ({"stop": ["list"]}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 40_000, "y" * 40_000)}, "stop"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_bad_sampling_params_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["stop_token_ids", "visible_token_ids"])
def test_params_that_name_tokens_beyond_the_vocabulary_are_refused(engine: InferenceEngine, field: str) -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary ends at") as caught:
        engine.generate("a", SamplingParams(**{field: (1 << 40,)}))  # type: ignore[arg-type]
    assert caught.value.param == field


def test_params_of_a_wrong_type_or_number_are_refused(engine: InferenceEngine) -> None:
    for params in ({"max_tokens": 3}, [SamplingParams()], 5):
        with pytest.raises(InvalidRequestError) as caught:
            engine.generate_batch(["a", "b"], params)  # type: ignore[arg-type]
        assert caught.value.param == "params"
    with pytest.raises(InvalidRequestError, match="generate_batch") as caught:
        engine.generate("a", SamplingParams(n=2))
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_num_seq": 4}, "max_num_seq"),
        ({"max_num_seqs": "4"}, "max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_tokens": 8}, "max_num_tokens"),
        ({"dtype": "int3"}, "dtype"),
        ({"num_threads": 0}, "num_threads"),
        ({"max_cpu_kv_bytes": -1}, "max_cpu_kv_bytes"),
        ({"step_timeout_seconds": float("nan")}, "step_timeout_seconds"),
        ({"start_timeout_seconds": 0}, "start_timeout_seconds"),
        ({"prefix_caching": "yes"}, "prefix_caching"),
        ({"config": EngineConfig(model_path="x")}, "config"),
    ],
)
def test_bad_engine_fields_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        InferenceEngine("folder", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields", [{"stop": ("x" * 10_000, "")}, {"max_tokens": -(10**5000)}, {"stop_token_ids": (10**5000, "")}]
)
def test_a_refusal_is_short_whatever_was_given(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert len(str(caught.value)) < 200


def test_a_configuration_is_given_whole_or_by_its_fields() -> None:
    with pytest.raises(InvalidRequestError, match="not both") as caught:
        InferenceEngine(config=EngineConfig(model_path="x"), max_num_seqs=4)
    assert caught.value.param == "config"


def test_an_engine_needs_a_model() -> None:
    with pytest.raises(InvalidRequestError, match="model_path must be str"):
        InferenceEngine()


@pytest.mark.parametrize(
    ("device", "fields", "num_tokens"),
    [
        ("cpu", {}, 512),
        ("cuda:0", {}, 8192),
        ("cpu", {"max_num_seqs": 700}, 700),
        ("cuda:1", {"max_num_seqs": 9000}, 9000),
        ("cpu", {"max_num_tokens": 300}, 300),
        ("cuda:0", {"max_num_tokens": 300}, 300),
    ],
)
def test_a_step_is_as_long_as_its_device_likes_and_has_room_for_every_sequence(
    device: str, fields: dict[str, int], num_tokens: int
) -> None:
    assert EngineConfig(model_path="", **fields).step_tokens(device) == num_tokens  # type: ignore[arg-type]


def test_the_child_is_told_where_a_request_stands_in_line_and_with_whom_it_shares_blocks(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[AddSequence] = []
    add = FakeCore.add

    def note(core: FakeCore, message: AddSequence) -> None:
        told.append(message)
        add(core, message)

    monkeypatch.setattr(FakeCore, "add", note)
    answers, vector = OutputRecorder(), OutputRecorder()
    placed: Any = {"priority": -3, "deadline": 7.5, "cache_key": "acme"}
    engine.submit("answers", [5, 6], SamplingParams(max_tokens=1, n=2), **placed, on_output=answers)
    engine.submit_embedding("vector", [[5]], **placed, on_output=vector)
    answers.wait_for_end()
    vector.wait_for_end()
    assert [(one.priority, one.deadline, one.cache_key) for one in told] == [(-3, 7.5, "acme")] * 3
    assert [one.group_id for one in told] == [told[0].sequence_id] * 2 + [None]
