"""Jobs in the engine's terms, and every reason to refuse one before it runs."""

from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from engine.embedding_reader import EmbeddingReader
from engine.errors import InvalidRequestError
from engine.messages import EngineInfo
from engine.pooling import Pooling
from engine.tokenizer import Tokenizer
from producer.contract import ErrorCode, ErrorInfo
from worker.chat import ChatRenderer
from worker.errors import JobRefusedError
from worker.parsing.model_format import ModelFormat
from worker.translate import TranslatedJob, Translator, default_seed

WORDS = ["[UNK]", "<s>", "</s>", "user", "assistant", "a", "b", "c"]
CONTEXT = 32
NO_FORMAT = ModelFormat(tool_calls=None, tool_parser="auto", has_reasoning=False)
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer() -> Tokenizer:
    raw = RawTokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(raw, chat_template=TEMPLATE, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def reader(raw: Tokenizer, info: EngineInfo) -> EmbeddingReader:
    return EmbeddingReader(raw, info, pooling=Pooling(), prefix="c ", end_id=2)


def translator(*, max_model_len: int = CONTEXT, is_bound_by_cache: bool = False) -> Translator:
    info = EngineInfo(
        device="cpu",
        dtype="float32",
        attention="torch",
        max_model_len=max_model_len,
        is_bound_by_cache=is_bound_by_cache,
        vocab_size=len(WORDS),
        eos_token_ids=(2,),
        block_size=4,
        num_kv_blocks=1000,
        fingerprint="f",
        model_dir="",
        hidden_size=16,
    )
    chat = ChatRenderer(TEMPLATE, special_tokens={"bos_token": "<s>"})
    return Translator(tokenizer(), chat, NO_FORMAT, info, ["tiny", "tiny-alias"], reader(tokenizer(), info))


def translate(**kwargs: Any) -> TranslatedJob:
    return translator().translate("job-1", kwargs)


def refusal(**kwargs: Any) -> ErrorInfo:
    with pytest.raises(JobRefusedError) as caught:
        translate(**kwargs)
    return caught.value.info


def test_a_text_prompt_gets_the_models_special_tokens() -> None:
    assert translate(prompt="a b").prompt_token_ids == [1, 5, 6]


def test_a_chat_has_its_special_tokens_from_the_template_alone() -> None:
    job = translate(messages=[{"role": "user", "content": "a"}])
    assert job.prompt_token_ids == [1, 3, 5, 4]


def test_token_ids_are_taken_as_they_are() -> None:
    assert translate(prompt=[5, 6, 7]).prompt_token_ids == [5, 6, 7]


def test_parameters_arrive_in_the_engines_terms() -> None:
    job = translate(
        prompt="a", max_tokens=5, n=3, temperature=0, top_p=0.5, min_p=0.1, seed=11, stop="x", stop_token_ids=[2],
        ignore_eos=True, priority=-4,
    )  # fmt: skip
    params = job.params
    assert (params.max_tokens, params.n, params.temperature, params.top_p, params.min_p) == (5, 3, 0.0, 0.5, 0.1)
    assert (params.seed, job.seed, params.stop, params.stop_token_ids, params.ignore_eos) == (
        11,
        11,
        ("x",),
        (2,),
        True,
    )
    assert job.request.priority == -4


@pytest.mark.parametrize(("asked", "given"), [(-1, None), (1, 1), (40, 40)])
def test_top_k_minus_one_is_off(asked: int, given: int | None) -> None:
    assert translate(prompt="a", top_k=asked).params.top_k == given


def test_a_job_without_a_seed_draws_from_its_id() -> None:
    first, again = translate(prompt="a"), translate(prompt="b")
    assert first.seed == again.seed == first.params.seed == default_seed("job-1")
    assert default_seed("job-1") == 0x01E636A65307B56B  # a stored stream is resumed under the seed of another process
    assert default_seed("job-2") != default_seed("job-1")


def test_a_negative_seed_is_folded_into_64_bits() -> None:
    assert translate(prompt="a", seed=-1).params.seed == 2**64 - 1
    assert translate(prompt="a", seed=2**64 - 1).params.seed == 2**64 - 1


def test_without_max_tokens_the_context_is_filled() -> None:
    assert translate(prompt="a b").params.max_tokens == CONTEXT - 3


def test_max_tokens_may_fill_the_context_exactly_and_not_pass_it() -> None:
    assert translate(prompt=[5] * 30, max_tokens=2).params.max_tokens == 2
    error = refusal(prompt=[5] * 30, max_tokens=3)
    assert (error.code, error.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "max_tokens")
    assert "30 tokens" in error.message and "33" in error.message and "at most 2" in error.message


@pytest.mark.parametrize("num_tokens", [CONTEXT, CONTEXT + 1])
def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(num_tokens: int) -> None:
    error = refusal(prompt=[5] * num_tokens)
    assert (error.code, error.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt")
    assert f"{num_tokens} tokens" in error.message
    assert (
        f"this model's maximum context length is {CONTEXT} tokens" in error.message
    )  # LiteLLM knows it by these words


def test_a_kv_cache_smaller_than_the_context_is_the_limit() -> None:
    small = translator(max_model_len=8, is_bound_by_cache=True)
    assert small.translate("j", {"prompt": "a"}).params.max_tokens == 6
    with pytest.raises(JobRefusedError, match=r"maximum context length is 8 tokens, all that .* KV cache holds"):
        small.translate("j", {"prompt": [5] * 9})


@pytest.mark.parametrize("name", ["tiny", "tiny-alias", None])
def test_a_served_model_name_is_accepted(name: str | None) -> None:
    assert translate(prompt="a", model=name).request.model == name


def test_a_job_for_another_model_is_told_what_is_served() -> None:
    error = refusal(prompt="a", model="gpt-9")
    assert (error.code, error.param) == (ErrorCode.MODEL_NOT_FOUND, "model")
    assert "'gpt-9'" in error.message and "tiny, tiny-alias" in error.message


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [5, len(WORDS)]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": "a", "stop_token_ids": [99]}, "stop_token_ids"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": 2.5}, "temperature"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": 0}, "top_k"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "v": 2}, "v"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": "hello"}, "messages"),
    ],
)
def test_a_job_that_breaks_the_contract_names_the_field(kwargs: dict[str, Any], param: str) -> None:
    error = refusal(**kwargs)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert not error.retryable


def test_what_is_to_be_embedded_gets_the_folders_prompt_and_end() -> None:
    job = translate(task="embed", inputs=["a b", [5, 6, 5], "b"], dimensions=4)
    assert job.to_embed == [[1, 7, 5, 6, 2], [5, 6, 5], [1, 7, 6, 2]] and job.num_prompt_tokens == 12
    assert translate(task="embed", prompt="a").to_embed == [[1, 7, 5, 2]]


@pytest.mark.parametrize(
    ("kwargs", "param", "code"),
    [
        ({"inputs": ["a", [5] * (CONTEXT + 1)]}, "inputs[1]", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ({"prompt": [5] * (CONTEXT + 1)}, "prompt", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ({"inputs": [[5, 8]]}, "inputs[0]", ErrorCode.INVALID_REQUEST),
        ({"prompt": "a", "dimensions": 17}, "dimensions", ErrorCode.INVALID_REQUEST),
    ],
)
def test_what_cannot_be_embedded_names_the_field(kwargs: dict[str, Any], param: str, code: ErrorCode) -> None:
    error = refusal(task="embed", **kwargs)
    assert (error.param, error.code) == (param, code)


def test_a_kind_of_pooling_that_is_not_served_is_refused_by_name() -> None:
    info, refused = translator()._info, InvalidRequestError("asks for the pooling cls", param="task")
    embeddings = EmbeddingReader(tokenizer(), info, pooling=refused)
    other = Translator(tokenizer(), ChatRenderer(None), NO_FORMAT, info, ["m"], embeddings)
    with pytest.raises(JobRefusedError, match="pooling cls") as caught:
        other.translate("j", {"prompt": "a", "task": "embed"})
    assert (caught.value.info.code, caught.value.info.param) == (ErrorCode.UNSUPPORTED, "task")


def test_a_prompt_without_a_single_token_is_refused() -> None:
    raw = RawTokenizer(WordLevel({"a": 0}, unk_token="a"))
    raw.pre_tokenizer = Whitespace()
    info = translator()._info
    bare = Translator(Tokenizer(raw), ChatRenderer(None), NO_FORMAT, info, ["m"], reader(Tokenizer(raw), info))
    with pytest.raises(JobRefusedError, match="no tokens") as caught:
        bare.translate("j", {"prompt": "  "})
    assert caught.value.info.param == "prompt"


def test_messages_for_a_model_without_a_template_are_refused() -> None:
    info = translator()._info
    chat = ChatRenderer(None, model="base")
    bare = Translator(tokenizer(), chat, NO_FORMAT, info, ["m"], reader(tokenizer(), info))
    with pytest.raises(JobRefusedError, match="no chat template") as caught:
        bare.translate("j", {"messages": [{"role": "user", "content": "a"}]})
    assert caught.value.info.param == "messages"


def test_what_is_asked_of_sampling_arrives_in_the_engines_terms() -> None:
    params = translate(
        prompt="a", min_tokens=2, presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.25,
        logit_bias={"5": 2, 6: -1.5}, logprobs=True, top_logprobs=3,
    ).params  # fmt: skip
    assert (params.min_tokens, params.presence_penalty, params.frequency_penalty) == (2, 0.5, -1)
    assert (params.repetition_penalty, params.logit_bias) == (1.25, ((5, 2), (6, -1.5)))
    assert (params.logprobs, params.prompt_logprobs) == (3, None)
    assert translate(prompt="a", logprobs=True).params.logprobs == 0
    assert translate(prompt="a").params.logprobs is None


def test_echo_gives_the_prompt_back_and_with_logprobs_has_it_scored() -> None:
    job = translate(prompt="a b", echo=True)
    assert job.echo is not None and (job.echo.token_ids, job.params.prompt_logprobs) == ([1, 5, 6], None)
    scored = translate(prompt="a b", echo=True, logprobs=True, top_logprobs=2, max_tokens=0)
    assert (scored.params.max_tokens, scored.params.logprobs, scored.params.prompt_logprobs) == (0, 2, 2)
    assert translate(prompt="a b").echo is None


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"logit_bias": {str(len(WORDS)): 1}}, ErrorCode.INVALID_REQUEST, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, ErrorCode.INVALID_REQUEST, "logit_bias"),
        ({"min_tokens": CONTEXT}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "min_tokens"),
        ({"top_logprobs": 2}, ErrorCode.INVALID_REQUEST, "top_logprobs"),
        ({"max_tokens": 0}, ErrorCode.INVALID_REQUEST, "max_tokens"),
    ],
)
def test_what_sampling_cannot_do_is_refused_by_field(fields: dict[str, Any], code: ErrorCode, param: str) -> None:
    error = refusal(prompt="a", **fields)
    assert (error.code, error.param) == (code, param)
