"""Drafts from what a sequence has read and said: the same tokens as without them, whatever happens to the sequence."""

import random

import numpy as np
import pytest

from engine.errors import DeviceMemoryError
from engine.grammar_spec import GrammarSpec
from engine.messages import FinishCode
from engine.prompt_lookup import drafter
from engine.prompt_lookup.draft_budget import DraftBudget
from engine.prompt_lookup.draft_planner import create_drafter
from engine.prompt_lookup.drafter import FIRST_LENGTH, MAX_DRAFT_TOKENS, Drafter
from engine.runner.batch_inputs import BatchInputs
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output

VOCAB_SIZE = 2  # so few that half of all guesses come true


def tokens_of(*token_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(token_ids, np.int32)


def test_a_draft_is_what_followed_the_last_three_tokens_where_they_stood_last() -> None:
    assert Drafter().draft(tokens_of(1, 2, 3, 4, 1, 2, 3, 5, 6, 9, 1, 2, 3), 3).tolist() == [5, 6, 9]
    assert Drafter().draft(tokens_of(1, 2, 3, 4, 5, 6), 3).tolist() == []
    assert Drafter().draft(tokens_of(1, 2), 3).tolist() == []
    assert Drafter().draft(tokens_of(1, 2, 3, 4, 1, 2, 3), 0).tolist() == []


def test_a_sequence_that_repeats_itself_is_guessed_to_go_on_doing_so() -> None:
    assert Drafter().draft(tokens_of(9, 1, 2, 1, 2, 1, 2, 1), 99).tolist() == [2, 1, 2]


def test_the_index_follows_a_sequence_that_grew_while_nobody_asked() -> None:
    guess = Drafter()
    assert guess.draft(tokens_of(1, 2, 3, 4), 4).tolist() == []
    assert guess.draft(tokens_of(1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7), 2).tolist() == [8, 5]
    assert guess.draft(tokens_of(1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 1, 2, 3), 2).tolist() == [4, 5]


def test_the_index_is_the_same_however_much_of_a_sequence_is_read_at_once() -> None:
    rng = random.Random(8)
    whole = tokens_of(*[rng.randrange(3) for _ in range(600)])
    for _ in range(20):
        in_parts, num_tokens = Drafter(), 0
        while num_tokens < len(whole):
            num_tokens = min(num_tokens + rng.choice([1, 1, 2, 31, 32, 33, 34, 90]), len(whole))
            known = whole[:num_tokens]
            assert in_parts.draft(known, 3).tolist() == Drafter().draft(known, 3).tolist() == expected_draft(known)


def expected_draft(token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> list[int]:
    """Of the three tokens behind the last earlier occurrence of the last three; from the end on it repeats itself."""
    known = token_ids.tolist()
    for start in range(len(known) - 1, 2, -1):
        if known[start - 3 : start] == known[-3:]:
            return (known[start:] * 3)[:3]
    return []


def test_guesses_grow_while_they_come_true_and_become_rare_while_they_do_not() -> None:
    tokens = tokens_of(*[1, 2, 3] * 10)
    guess = Drafter()
    lengths = []
    for _ in range(4):
        lengths.append(len(guess.draft(tokens, 99)))
        guess.note(lengths[-1], lengths[-1], has_paid=True)
    assert lengths == [3, 6, 12, MAX_DRAFT_TOKENS]
    drafted = 0
    for _ in range(1000):
        if num_drafted := len(guess.draft(tokens, 99)):
            drafted += 1
            guess.note(num_drafted, 0, has_paid=False)
    assert drafted < 25


@pytest.mark.parametrize("num_at_once", [1, 3, 8])
@pytest.mark.parametrize("length", [16, 200])
def test_what_is_guessed_in_vain_is_bounded_by_the_steps_however_many_sequences_try(
    num_at_once: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draft_wrongly(drafter: Drafter, token_ids: np.ndarray, max_tokens: int) -> np.ndarray:
        return np.full(max(0, min(max_tokens, MAX_DRAFT_TOKENS)), 1, np.int32)

    monkeypatch.setattr(Drafter, "draft", draft_wrongly)
    driver = CoreDriver(FakeRunner(vocab_size=1, num_blocks=200), prompt_lookup="on")  # every token is 0
    for _ in range(1600 // length):
        driver.add([0] * 5, max_tokens=length)
        if driver.num_added % num_at_once == 0:
            driver.run()
    driver.run()
    stats = driver.core.get_stats()
    assert stats.num_accepted_draft_tokens == 0
    assert stats.num_steps / 8 - FIRST_LENGTH < stats.num_draft_tokens <= 2 * MAX_DRAFT_TOKENS + stats.num_steps / 8


def test_guesses_that_come_true_pay_for_others() -> None:
    budget = DraftBudget()
    budget.spend(budget.num_left)
    assert budget.num_left == 0
    assert not budget.pay(15, 1, num_rows=1)  # nine tokens' worth: a step without its row
    assert budget.num_left == 9
    assert budget.pay(15, 2, num_rows=1)
    assert budget.num_left == 27
    budget.spend(27)
    assert not budget.pay(3, 1, num_rows=8)  # an eighth of a step
    assert budget.num_left == 0, "less than a first draft needs"
    assert budget.pay(3, 2, num_rows=8)
    assert budget.num_left == 6


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"min_tokens": 3},
        {"logit_bias": ((1, 2.0),)},
        {"logprobs": 0},
        {"frequency_penalty": 1.0},
        {"grammar": GrammarSpec("json_object")},
    ],
)
def test_a_sequence_whose_next_token_depends_on_more_is_not_guessed(params: dict[str, object]) -> None:
    assert create_drafter(SamplingParams(**params)) is None  # type: ignore[arg-type]
    assert create_drafter(SamplingParams(temperature=0.5, top_p=0.9)) is not None


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses go on however often they fail."""
    monkeypatch.setattr(drafter, "_MAX_PAUSE", 0)
    monkeypatch.setattr(DraftBudget, "num_left", MAX_DRAFT_TOKENS)
    monkeypatch.setattr(DraftBudget, "spend", lambda budget, num_drafted: None)


@pytest.mark.usefixtures("tireless")
@pytest.mark.parametrize(("num_blocks", "max_num_tokens"), [(200, 64), (24, 64), (24, 9)])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_are_the_same_under_preemption_chunks_and_resumption(
    num_blocks: int, max_num_tokens: int, prefix_caching: bool
) -> None:
    rng, sizes = random.Random(5), list[int]()
    runner = FakeRunner(
        num_blocks=num_blocks,
        vocab_size=VOCAB_SIZE,
        max_model_len=90,
        on_execute=lambda inputs: sizes.append(inputs.num_tokens),
    )
    driver = CoreDriver(
        runner, max_num_seqs=6, max_num_tokens=max_num_tokens, prefix_caching=prefix_caching, prompt_lookup="on"
    )
    expected: dict[int, list[int]] = {}
    for seed in range(25):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        max_tokens = rng.randint(1, 50)
        output = undisturbed_output(runner.info, prompt, max_tokens=max_tokens, seed=seed)
        resumed = output[: rng.randrange(len(output))] if seed % 3 == 0 else []
        expected[driver.add(prompt, max_tokens=max_tokens, seed=seed, output=resumed)] = output
    driver.run()
    stats = driver.core.get_stats()
    assert driver.outputs == expected
    assert set(driver.finished.values()) == {FinishCode.LENGTH}
    assert (stats.num_preemptions > 0) == (num_blocks == 24)
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
    assert stats.num_kv_blocks_used == 0 and max(sizes) <= max_num_tokens


@pytest.mark.usefixtures("tireless")
def test_drafts_save_steps() -> None:
    steps = {}
    for switch in ("on", "off"):
        driver = CoreDriver(FakeRunner(vocab_size=1, num_blocks=100), prompt_lookup=switch)
        driver.add([0, 0, 0, 0], max_tokens=100)
        driver.run()
        steps[switch] = driver.core.get_stats().num_steps
        assert driver.core.get_stats().num_generated_tokens == 100
    assert steps["off"] == 100 and steps["on"] < 15


@pytest.mark.usefixtures("tireless")
def test_a_drafted_stop_token_ends_the_sequence_where_it_would_have_ended() -> None:
    """It stands in the prompt, or it could not be in a draft."""
    info, num_stopped = FakeRunner(vocab_size=3).info, 0
    prompt = [0, 1, 2, 0, 0, 2, 1, 1, 2, 0, 1, 0, 2] * 2
    for seed in range(30):
        expected = undisturbed_output(info, prompt, max_tokens=60, seed=seed, stop_token_ids=(2,))
        driver = CoreDriver(FakeRunner(vocab_size=3, num_blocks=100), prompt_lookup="on")
        sequence_id = driver.add(prompt, max_tokens=60, seed=seed, stop_token_ids=(2,))
        driver.run()
        assert driver.outputs[sequence_id] == expected and driver.finished[sequence_id] is FinishCode.STOP
        num_stopped += driver.core.get_stats().num_draft_tokens > 0
    assert num_stopped > 10


@pytest.mark.usefixtures("tireless")
def test_blocks_that_a_draft_took_in_vain_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.ones(MAX_DRAFT_TOKENS, np.int32)
    monkeypatch.setattr(Drafter, "draft", lambda drafter, token_ids, max_tokens: wrong[:max_tokens])
    driver = CoreDriver(FakeRunner(vocab_size=1, num_blocks=20, block_size=4), prompt_lookup="on")  # every token is 0
    driver.add([0] * 5, max_tokens=20)
    while driver.core.has_work():
        driver.step()
        assert driver.core.get_stats().num_kv_blocks_used <= -(-(5 + len(driver.outputs[0])) // 4)
    assert driver.core.get_stats().num_draft_tokens > 100


@pytest.mark.usefixtures("tireless")
@pytest.mark.parametrize(("num_sequences", "has_drafts"), [(8, True), (9, False)])
def test_nothing_is_guessed_where_many_run(num_sequences: int, has_drafts: bool) -> None:
    driver = CoreDriver(FakeRunner(vocab_size=1, num_blocks=100), max_num_seqs=9, max_num_tokens=64, prompt_lookup="on")
    for _ in range(num_sequences):
        driver.add([0] * 4, max_tokens=5)
    for _ in range(2):
        driver.step()
    assert (driver.core.get_stats().num_draft_tokens > 0) is has_drafts
    driver.run()


@pytest.mark.usefixtures("tireless")
def test_drafts_take_no_block_from_anybody() -> None:
    runner = FakeRunner(vocab_size=1, num_blocks=8, block_size=4, max_model_len=32)
    driver = CoreDriver(runner, max_num_seqs=2, prompt_lookup="on", prefix_caching=False)
    first, second = driver.add([0] * 11, max_tokens=4), driver.add([0] * 11, max_tokens=4)
    driver.run()
    assert driver.core.get_stats().num_preemptions == 0
    assert driver.finished == {first: FinishCode.LENGTH, second: FinishCode.LENGTH}


@pytest.mark.usefixtures("tireless")
def test_a_step_that_does_not_fit_with_its_drafts_is_run_without_them() -> None:
    def run_short(inputs: BatchInputs) -> None:
        if inputs.num_seqs == 1 and inputs.num_tokens > 1 and int(inputs.position_ids[0]) > 10:
            raise DeviceMemoryError("out of memory")

    runner = FakeRunner(vocab_size=1, num_blocks=100, on_execute=run_short)
    driver = CoreDriver(runner, prompt_lookup="on")
    sequence_id = driver.add([0] * 5, max_tokens=40)
    driver.run()
    assert driver.outputs[sequence_id] == [0] * 40 and driver.errors == {}
