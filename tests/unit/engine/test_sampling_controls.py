"""What a request asks of sampling, through the core on a tiny model: transformers is the judge, and nothing but a
request's own tokens decides.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence, StepOutput
from engine.sampling_params import SamplingParams
from tests.fakes.reference import generate, random_prompts
from tests.fakes.tiny_models import make_tiny_model

BLOCK_SIZE = 16
LENGTHS = [1, 2, 40, 17, 100, 5, 33]
NUM_TOKENS = 24


@dataclass
class Output:
    """What one sequence was given."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[list[tuple[int, float]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def core_of(folder: Path, *, num_kv_blocks: int = 200, max_num_tokens: int = 512, **overrides: Any) -> EngineCore:
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_kv_blocks,
        max_num_tokens=max_num_tokens,
        **overrides,
    )
    return EngineCore(config)


def tight_core(folder: Path) -> EngineCore:
    """Chunked prefills and preemptions."""
    return core_of(folder, num_kv_blocks=12, max_num_tokens=32)


def add(
    core: EngineCore, number: int, prompt: list[int], params: SamplingParams, output: list[int] | None = None
) -> None:
    num_scored = None if params.prompt_logprobs is None or output else 0
    core.add(
        AddSequence(
            sequence_id=number,
            prompt_token_ids=prompt,
            params=params,
            output_token_ids=list(output or []),
            num_scored=num_scored,
        )
    )


def take(step: StepOutput, outputs: dict[int, Output], params: SamplingParams) -> None:
    assert not step.errors
    for sequence_id, token_id in zip(step.sequence_ids.tolist(), step.token_ids.tolist(), strict=True):
        outputs[sequence_id].token_ids.append(token_id)
    if step.logprobs is not None:
        for entry, row in enumerate(step.logprobs.rows.tolist()):
            output = outputs[int(step.sequence_ids[row])]
            output.logprobs.append(float(step.logprobs.logprobs[entry]))
            output.tops.append(step.logprobs.top(entry, params.logprobs or 0))
    if step.prompt_logprobs is not None:
        for entry, sequence_id in enumerate(step.prompt_logprobs.rows.tolist()):
            outputs[sequence_id].prompt_logprobs.append(float(step.prompt_logprobs.logprobs[entry]))
            outputs[sequence_id].prompt_tops.append(step.prompt_logprobs.top(entry, params.prompt_logprobs or 0))


def finish(core: EngineCore, outputs: dict[int, Output], params: SamplingParams) -> None:
    while core.has_work():
        take(core.step(), outputs, params)
        core.check_integrity()


def run(core: EngineCore, prompts: list[list[int]], params: SamplingParams) -> list[Output]:
    outputs = {number: Output() for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        add(core, number, prompt, params)
    finish(core, outputs, params)
    return list(outputs.values())


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True} | fields)


def test_greedy_tokens_under_penalty_bias_and_min_tokens_equal_generate(folder: Path, reference: Any) -> None:
    prompts = random_prompts(LENGTHS)
    plain = [output.token_ids for output in run(tight_core(folder), prompts, greedy())]
    bias = {plain[0][0]: -100.0, plain[1][0]: -1.5, 77: 1.0}
    stops = sorted({tokens[3] for tokens in plain})
    params = greedy(repetition_penalty=1.4, logit_bias=tuple(bias.items()), min_tokens=10, stop_token_ids=tuple(stops))
    outputs = [output.token_ids for output in run(tight_core(folder), prompts, params)]
    expected = [
        generate(
            reference,
            prompt,
            NUM_TOKENS,
            repetition_penalty=1.4,
            sequence_bias={(token_id,): value for token_id, value in bias.items()},
            min_new_tokens=10,
            eos_token_id=stops,
        )
        for prompt in prompts
    ]
    assert outputs == expected
    assert outputs != plain and all(len(tokens) > 10 for tokens in outputs)
    assert any(len(tokens) < NUM_TOKENS for tokens in outputs), "no answer was ended by a stop token"


def test_greedy_tokens_under_presence_and_frequency_penalties_equal_openais_formula(
    folder: Path, reference: Any
) -> None:
    prompts = random_prompts(LENGTHS)
    outputs = run(tight_core(folder), prompts, greedy(presence_penalty=0.7, frequency_penalty=1.1))
    plain = run(tight_core(folder), prompts, greedy())
    assert [output.token_ids for output in outputs] != [output.token_ids for output in plain]
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = teacher_forced(reference, prompt + output.token_ids)
        counts = torch.zeros(logits.shape[1])
        for place, token_id in enumerate(output.token_ids):
            row = logits[len(prompt) - 1 + place] - 1.1 * counts - 0.7 * (counts > 0)
            assert int(row.argmax()) == token_id
            counts[token_id] += 1


def teacher_forced(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_logprobs_of_output_and_prompt_are_the_models_own_whatever_else_is_asked(folder: Path, reference: Any) -> None:
    prompts = random_prompts(LENGTHS)
    params = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=1.3,
        top_p=0.9,
        frequency_penalty=1.0,
        logit_bias=((100, 5.0),),
        logprobs=4,
        prompt_logprobs=3,
        ignore_eos=True,
        seed=5,
    )
    for prompt, output in zip(prompts, run(tight_core(folder), prompts, params), strict=True):
        assert (len(output.logprobs), len(output.prompt_logprobs)) == (NUM_TOKENS, len(prompt) - 1)
        tokens = prompt + output.token_ids
        expected = teacher_forced(reference, tokens).log_softmax(-1)[:-1]
        found = torch.tensor(output.prompt_logprobs + output.logprobs)
        # float32: the engine's attention and transformers' add in other orders
        torch.testing.assert_close(
            found, expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], atol=1e-4, rtol=0
        )
        for row, top in zip(expected, output.prompt_tops + output.tops, strict=True):
            wanted = row.topk(len(top))
            assert [token_id for token_id, _ in top] == wanted.indices.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in top]), wanted.values, atol=1e-4, rtol=0)


EVERYTHING = SamplingParams(
    max_tokens=NUM_TOKENS,
    temperature=0.9,
    top_k=40,
    min_p=0.001,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias=((50, 2.0), (60, -100.0)),
    min_tokens=8,
    stop_token_ids=(50, 70, 90, 110),
    logprobs=3,
    prompt_logprobs=2,
    seed=11,
)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Output]:
    """Each prompt in a core of its own, in one go."""
    core = core_of(folder, prefix_caching=False)
    return [run(core, [prompt], EVERYTHING)[0] for prompt in random_prompts(LENGTHS)]


def test_together_in_chunks_and_preempted_each_answer_is_the_same_to_the_bit(folder: Path, alone: list[Output]) -> None:
    assert run(core_of(folder), random_prompts(LENGTHS), EVERYTHING) == alone
    core = tight_core(folder)
    assert run(core, random_prompts(LENGTHS), EVERYTHING) == alone
    assert core.get_stats().num_preemptions > 0


def test_a_cached_prefix_changes_nothing_and_is_not_used_for_a_prompt_to_be_scored(
    folder: Path, alone: list[Output]
) -> None:
    core = core_of(folder)
    prompts = random_prompts(LENGTHS)
    for _ in range(2):
        assert run(core, prompts, EVERYTHING) == alone
    assert core.get_stats().num_cached_tokens == 0
    unscored = SamplingParams(
        **{name: getattr(EVERYTHING, name) for name in EVERYTHING.__slots__ if name[:6] != "prompt"}
    )
    for output, expected in zip(run(core, prompts, unscored), alone, strict=True):
        assert (output.token_ids, output.logprobs) == (expected.token_ids, expected.logprobs)
    assert core.get_stats().num_cached_tokens > 0


def test_a_resumed_answer_goes_on_to_the_bit_and_scores_no_prompt_again(folder: Path, alone: list[Output]) -> None:
    prompts = random_prompts(LENGTHS)
    core = core_of(folder)
    for num_done in (1, 5, 9):
        outputs: dict[int, Output] = {}
        for number, (prompt, whole) in enumerate(zip(prompts, alone, strict=True)):
            if len(whole.token_ids) > num_done:
                outputs[number] = Output()
                add(core, number, prompt, EVERYTHING, whole.token_ids[:num_done])
        finish(core, outputs, EVERYTHING)
        for number, output in outputs.items():
            whole = alone[number]
            expected = Output(whole.token_ids[num_done:], whole.logprobs[num_done:], whole.tops[num_done:])
            assert output == expected


def test_prompts_longer_than_a_steps_scores_are_scored_in_order(folder: Path) -> None:
    prompts = random_prompts([700, 300, 1])
    core = core_of(folder, max_num_tokens=1024)
    long, short, single = run(core, prompts, greedy(prompt_logprobs=1, max_tokens=2))
    assert core.get_stats().num_steps < 10
    assert [len(output.prompt_logprobs) for output in (long, short, single)] == [699, 299, 0]
    assert run(core_of(folder, max_num_tokens=1024), prompts[1:], greedy(prompt_logprobs=1, max_tokens=2)) == [
        short,
        single,
    ]


def test_rows_that_ask_for_nothing_are_the_same_beside_rows_that_ask(folder: Path) -> None:
    prompts = random_prompts(LENGTHS)
    expected = run(core_of(folder), prompts, greedy())
    core = core_of(folder)
    outputs = {number: Output() for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        add(core, number, prompt, EVERYTHING if number % 2 else greedy())
    finish(core, outputs, EVERYTHING)
    for number in range(0, len(prompts), 2):
        assert outputs[number] == expected[number]
