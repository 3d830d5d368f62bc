"""Steps computed ahead of their plan give the tokens of sequences that run alone, over pages where mistakes show."""

import random
from typing import Any

import pytest

from tests.fakes.core_driver import CoreDriver, random_prompt
from tests.fakes.fake_runner import undisturbed_output
from tests.fakes.fake_runner_ahead import FakeRunnerAhead


def test_every_step_but_the_first_one_is_computed_ahead() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(4):
        driver.add([seed, 2, 3], max_tokens=20, seed=seed)
    driver.run()
    for seed in range(4):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed, 2, 3], max_tokens=20, seed=seed)
    # The first step gives the first tokens, and nobody asks for the last guess.
    assert (runner.num_taken, runner.num_computed) == (19, 20)
    assert runner.idle_seconds == 0


def test_a_guess_serves_those_that_go_on_when_others_end() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(4):
        driver.add([seed, 2, 3], max_tokens=6 + 3 * seed, seed=seed)
    driver.run()
    for seed in range(4):
        expected = undisturbed_output(runner.info, [seed, 2, 3], max_tokens=6 + 3 * seed, seed=seed)
        assert driver.outputs[seed] == expected
    assert runner.num_taken == runner.num_computed - 1 == 14


def test_a_prompt_that_comes_meanwhile_costs_no_guess() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(3):
        driver.add([seed, 2, 3], max_tokens=20, seed=seed)
        for _ in range(4):
            driver.step()
    driver.run()
    for seed in range(3):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed, 2, 3], max_tokens=20, seed=seed)
    assert runner.num_completed == 2 and runner.num_taken == runner.num_computed - 1 == 27


def test_a_newcomer_of_one_token_spoils_no_guess() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(2):
        driver.add([7] * 5, max_tokens=20, seed=seed)  # all of the second one but its last token is cached
        for _ in range(4):
            driver.step()
    driver.run()
    for seed in range(2):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [7] * 5, max_tokens=20, seed=seed)
    assert runner.num_completed == 1 and runner.num_taken == runner.num_computed - 1


@pytest.mark.parametrize(("num_prompt_tokens", "num_decodes"), [(61, 0), (50, 3), (39, 3)])
def test_a_long_prompt_goes_on_ahead_in_one_forward_with_the_decodes(num_prompt_tokens: int, num_decodes: int) -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, max_num_tokens=12, prompt_lookup="off")
    prompts = [[seed, 2] for seed in range(num_decodes)] + [[9] * num_prompt_tokens]
    for seed, prompt in enumerate(prompts):
        driver.add(prompt, max_tokens=25, seed=seed)
    driver.run()
    for seed, prompt in enumerate(prompts):
        assert driver.outputs[seed] == undisturbed_output(runner.info, prompt, max_tokens=25, seed=seed)
    # Every step but the first was computed ahead as a whole.
    assert runner.num_completed == 0 and runner.num_taken == driver.core.get_stats().num_steps - 1
    assert runner.idle_seconds == 0


def test_a_prompts_chunk_stays_what_was_guessed_when_decodes_end_and_others_come() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, max_num_seqs=5, max_num_tokens=12, prompt_lookup="off")
    prompts = [[0, 2], [1, 2], [2, 2], [9] * 60, [3, 2], [4, 4]]
    lengths = [3, 5, 20, 9, 9, 9]
    for seed in range(4):
        driver.add(prompts[seed], max_tokens=lengths[seed], seed=seed)
    driver.step()
    driver.add(prompts[4], max_tokens=lengths[4], seed=4)  # the fifth slot is his, when there are tokens
    driver.add(prompts[5], max_tokens=lengths[5], seed=5, priority=-1)
    while not driver.outputs[3]:
        driver.step()
    assert driver.outputs[5], "the more urgent one is computed beside the long prompt"
    # But for the first step; the one who waits is admitted before the last of the long prompt leaves him tokens.
    assert runner.num_completed == 0 and runner.num_taken == driver.core.get_stats().num_steps - 1
    driver.run()
    for seed in range(6):
        expected = undisturbed_output(runner.info, prompts[seed], max_tokens=lengths[seed], seed=seed)
        assert driver.outputs[seed] == expected


def test_prompts_that_wait_for_tokens_are_foreseen() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, max_num_seqs=8, max_num_tokens=12, prompt_lookup="off")
    for seed in range(8):
        driver.add([seed] * (5 + seed), max_tokens=6, seed=seed)
    driver.run()
    for seed in range(8):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed] * (5 + seed), max_tokens=6, seed=seed)
    assert runner.num_completed == 0 and runner.num_taken == driver.core.get_stats().num_steps - 1


def test_one_who_was_admitted_ahead_waits_again_when_a_prompt_whose_blocks_he_shares_fails() -> None:
    runner = FakeRunnerAhead(num_blocks=64, poison_token=49)
    driver = CoreDriver(runner, max_num_seqs=4, max_num_tokens=12, prompt_lookup="off")
    shared = [7] * 8
    driver.add([*shared, 49, 1, 2, 3], max_tokens=4, seed=0)
    driver.add([*shared, 5, 6], max_tokens=4, seed=1)
    driver.run()
    assert 0 in driver.errors
    assert driver.outputs[1] == undisturbed_output(runner.info, [*shared, 5, 6], max_tokens=4, seed=1)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "prompts"),
    [(2, 12, [[7] * 5, [7, 7, 49], [7] * 4]), (1, 20, [[7, 7, 7, 5, 5, 5, 5], [7, 49, 5], [7, 5, 5]])],
)
def test_a_chunk_that_was_guessed_is_not_taken_for_another_of_who_was_sent_back_and_has_the_same_places(
    block_size: int, num_blocks: int, prompts: list[list[int]]
) -> None:
    runner = FakeRunnerAhead(num_blocks=num_blocks, block_size=block_size, poison_token=49)
    driver = CoreDriver(runner, max_num_seqs=3, max_num_tokens=3, prompt_lookup="off")
    for seed, prompt in enumerate(prompts):
        driver.add(prompt, max_tokens=2, seed=seed)
    driver.run()
    assert list(driver.errors) == [1]
    for seed in (0, 2):
        assert driver.outputs[seed] == undisturbed_output(runner.info, prompts[seed], max_tokens=2, seed=seed)


@pytest.mark.parametrize("num_blocks", [200, 15])
def test_the_device_never_waits_while_more_prompts_come_than_there_are_slots(num_blocks: int) -> None:
    def run(*, is_ahead: bool) -> FakeRunnerAhead:
        rng = random.Random(5)
        runner = FakeRunnerAhead(num_blocks=num_blocks, is_ahead=is_ahead)
        driver = CoreDriver(runner, max_num_seqs=5, max_num_tokens=16, prompt_lookup="off")
        expected = []
        for seed in range(30):
            prompt, max_tokens = random_prompt(rng, rng.randint(1, 5)), rng.randint(2, 9)
            driver.add(prompt, max_tokens=max_tokens, seed=seed)
            expected.append(undisturbed_output(runner.info, prompt, max_tokens=max_tokens, seed=seed))
        driver.run()
        assert [driver.outputs[seed] for seed in range(30)] == expected
        return runner

    assert run(is_ahead=False).idle_seconds > 20
    assert run(is_ahead=True).idle_seconds == 0


def test_prompts_that_wait_for_the_next_steps_tokens_are_computed_in_one_forward_with_the_decodes() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, max_num_seqs=8, max_num_tokens=12, prompt_lookup="off")
    for seed in range(6):
        driver.add([seed] * 8, max_tokens=10, seed=seed)
    driver.run()
    for seed in range(6):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed] * 8, max_tokens=10, seed=seed)
    assert runner.num_completed == 0
    assert runner.num_forwards == driver.core.get_stats().num_steps + 1


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("num_blocks", [12, 24, 200])
@pytest.mark.parametrize("seed", range(6))
def test_comings_endings_aborts_and_preemptions_change_no_token(block_size: int, num_blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    runner = FakeRunnerAhead(num_blocks=num_blocks * 4 // block_size, block_size=block_size, max_model_len=40)
    driver = CoreDriver(runner, max_num_seqs=5, max_num_tokens=12, prompt_lookup=rng.choice(["on", "off"]))
    expected: dict[int, list[int]] = {}
    while len(expected) < 40 or driver.core.has_work():
        if len(expected) < 40 and rng.random() < 0.3:
            expected.update(_add_choices(rng, driver, runner))
        if expected and rng.random() < 0.05:
            victim = rng.choice(list(expected))
            driver.core.abort([victim])
            expected[victim] = list(driver.outputs[victim])
        driver.step()
    assert driver.outputs == expected
    assert runner.num_taken > runner.num_completed > 0
    driver.core.check_integrity()


def _add_choices(rng: random.Random, driver: CoreDriver, runner: FakeRunnerAhead) -> dict[int, list[int]]:
    """Add a request with one choice or two, some of its tokens maybe there already; what is to come of each."""
    prompt = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 25), "seed": rng.randrange(9)}
    options["stop_token_ids"] = tuple(rng.sample(range(50), 2))
    urgency: dict[str, Any] = {"priority": rng.choice([0, 0, 0, 1]), "deadline": rng.choice([None, None, 3.0, 9.0])}
    group = driver.num_added if rng.random() < 0.3 else None
    expected = {}
    for choice in range(1 if group is None else 2):
        whole = undisturbed_output(runner.info, prompt, choice=choice, **options)
        output = whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else []
        sequence_id = driver.add(prompt, choice=choice, group=group, output=output, **urgency, **options)
        expected[sequence_id] = whole
    return expected


def test_a_sequence_that_goes_bad_or_raises_ahead_of_its_turn_fails_alone() -> None:
    variants: tuple[dict[str, Any], ...] = ({"poison_token": 49}, {"raising_token": 49})
    for options in variants:
        runner = FakeRunnerAhead(num_blocks=64, **options)
        driver = CoreDriver(runner, prompt_lookup="off")
        for seed in range(6):
            driver.add([seed, 2, 3], max_tokens=60, seed=seed)
        driver.run()
        for seed in range(6):
            whole = undisturbed_output(runner.info, [seed, 2, 3], max_tokens=60, seed=seed)
            if 49 in whole[:-1]:
                assert seed in driver.errors and driver.outputs[seed] == whole[: whole.index(49) + 1]
            else:
                assert driver.outputs[seed] == whole
        assert driver.errors, "the fake has a sequence that meets the token"
