"""What a core promises of one sequence: its limits, its end, its resumption, its failure alone."""

from collections.abc import Callable

import numpy as np
import pytest

from engine.errors import ContextLengthError, DeviceLostError, DeviceMemoryError, InvalidRequestError
from engine.messages import FinishCode
from engine.runner.batch_inputs import BatchInputs
from engine.token_budget import STEPS_TO_RECOVER
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output


def test_max_tokens_ends_a_sequence_with_length() -> None:
    driver = CoreDriver(FakeRunner())
    sequence_id = driver.add([1, 2, 3], max_tokens=5)
    driver.run()
    assert driver.finished[sequence_id] is FinishCode.LENGTH and len(driver.outputs[sequence_id]) == 5


def test_a_full_context_ends_a_sequence_with_length() -> None:
    driver = CoreDriver(FakeRunner(max_model_len=20))
    sequence_id = driver.add([1, 2, 3], max_tokens=None)
    other = driver.add([1, 2, 3, 4], max_tokens=500)
    driver.run()
    assert driver.finished == {sequence_id: FinishCode.LENGTH, other: FinishCode.LENGTH}
    assert len(driver.outputs[sequence_id]) == 17 and len(driver.outputs[other]) == 16


def test_a_pool_smaller_than_the_context_bounds_the_length() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=4, block_size=4, max_model_len=1000))
    sequence_id = driver.add([1, 2, 3], max_tokens=None)
    driver.run()
    assert driver.core.info.max_model_len == 16
    assert len(driver.outputs[sequence_id]) == 13


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_the_numbers() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=4, block_size=4))
    with pytest.raises(ContextLengthError, match=r"16 tokens .* 16 fit here .*4 blocks of 4") as refusal:
        driver.add([1] * 16)
    assert refusal.value.param == "prompt"
    longest = driver.add([1] * 15, max_tokens=3)
    driver.run()
    assert len(driver.outputs[longest]) == 1


@pytest.mark.parametrize(("prompt", "reason"), [([], "at least one"), ([1, 50], "id 50"), ([1, -1], "id -1")])
def test_a_malformed_prompt_is_refused_by_field(prompt: list[int], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refusal:
        CoreDriver(FakeRunner(vocab_size=50)).add(prompt)
    assert refusal.value.param == "prompt"


def test_a_stop_token_ends_a_sequence_and_is_reported() -> None:
    runner = FakeRunner()
    tokens = undisturbed_output(runner.info, [1, 2, 3], max_tokens=10)
    driver = CoreDriver(runner)
    stopped = driver.add([1, 2, 3], max_tokens=10, stop_token_ids=(tokens[4],))
    driver.run()
    assert driver.finished[stopped] is FinishCode.STOP
    assert driver.outputs[stopped] == tokens[: tokens.index(tokens[4]) + 1]


def test_more_stop_tokens_than_the_table_holds_work_too() -> None:
    runner = FakeRunner(vocab_size=1000)
    tokens = undisturbed_output(runner.info, [1, 2, 3], max_tokens=10)
    others = tuple(token for token in range(20) if token not in tokens)
    driver = CoreDriver(runner)
    stopped = driver.add([1, 2, 3], max_tokens=10, stop_token_ids=(*others, tokens[4]))
    going_on = driver.add([1, 2, 3], max_tokens=10, stop_token_ids=others)
    driver.run()
    assert driver.outputs == {stopped: tokens[:5], going_on: tokens}


def test_end_of_sequence_stops_unless_ignored() -> None:
    tokens = undisturbed_output(FakeRunner().info, [1, 2, 3], max_tokens=10)
    driver = CoreDriver(FakeRunner(eos_token_ids=(tokens[3], 49)))
    stopped = driver.add([1, 2, 3], max_tokens=10)
    ignoring = driver.add([1, 2, 3], max_tokens=10, ignore_eos=True)
    driver.run()
    assert driver.finished == {stopped: FinishCode.STOP, ignoring: FinishCode.LENGTH}
    assert driver.outputs == {stopped: tokens[: tokens.index(tokens[3]) + 1], ignoring: tokens}


def test_a_resumed_sequence_goes_on_as_if_it_had_never_stopped() -> None:
    runner = FakeRunner()
    whole = undisturbed_output(runner.info, [5, 6, 7], max_tokens=12, seed=3, choice=2)
    driver = CoreDriver(runner)
    ids = [driver.add([5, 6, 7], max_tokens=12, seed=3, choice=2, output=whole[:n]) for n in range(12)]
    driver.run()
    assert all(driver.outputs[sequence_id] == whole for sequence_id in ids)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "output"), [([1], 2, [3, 4]), ([1], 5, [3, 9]), ([1] * 10, None, [2] * 10)]
)
def test_a_sequence_that_comes_complete_is_refused(
    prompt: list[int], max_tokens: int | None, output: list[int]
) -> None:
    driver = CoreDriver(FakeRunner(eos_token_ids=(9,), max_model_len=20))
    with pytest.raises(InvalidRequestError, match="all the output") as refusal:
        driver.add(prompt, max_tokens=max_tokens, output=output)
    assert refusal.value.param == "output_token_ids" and not driver.core.has_work()


def test_choices_and_seeds_of_one_prompt_differ_and_do_not_depend_on_their_neighbours() -> None:
    runner = FakeRunner()
    driver = CoreDriver(runner)
    ids = {(seed, choice): driver.add([1, 2], seed=seed, choice=choice) for seed in (0, -5) for choice in (0, 1)}
    driver.run()
    for (seed, choice), sequence_id in ids.items():
        alone = undisturbed_output(runner.info, [1, 2], max_tokens=8, seed=seed, choice=choice)
        assert driver.outputs[sequence_id] == alone


def test_an_id_that_is_in_use_is_refused() -> None:
    driver = CoreDriver(FakeRunner())
    driver.add([1])
    driver._next_id = 0
    with pytest.raises(InvalidRequestError, match="sequence 0"):
        driver.add([1])


def expect_others_undisturbed(driver: CoreDriver, runner: FakeRunner, prompts: dict[int, list[int]]) -> None:
    for sequence_id, prompt in prompts.items():
        assert driver.outputs[sequence_id] == undisturbed_output(runner.info, prompt, max_tokens=8)
        assert driver.finished[sequence_id] is FinishCode.LENGTH


@pytest.mark.parametrize(
    ("make_runner", "reason"),
    [
        (lambda: FakeRunner(vocab_size=60, poison_token=55), "not finite"),
        (lambda: FakeRunner(vocab_size=60, raising_token=55), "ValueError: token 55"),
    ],
)
def test_a_sequence_that_spoils_a_step_fails_alone(make_runner: Callable[[], FakeRunner], reason: str) -> None:
    runner = make_runner()
    driver = CoreDriver(runner, max_num_tokens=64)
    prompts = {driver.add(prompt): prompt for prompt in ([1, 2, 3], [4] * 20)}
    driver.step()
    shared = [1, 2, 3, 4, 5, 6, 7, 8]
    failing = driver.add([*shared, 55, *shared])
    prompts |= {driver.add(prompt): prompt for prompt in ([*shared, 9], [*shared, 10], [11])}
    driver.run()
    assert list(driver.errors) == [failing] and reason in driver.errors[failing]
    expect_others_undisturbed(driver, runner, prompts)
    assert driver.core.get_stats().num_kv_blocks_used == 0


@pytest.mark.parametrize("max_num_tokens", [64, 8])  # in one step, or in an earlier one as well
def test_what_a_failed_sequence_computed_is_not_found_by_the_next(max_num_tokens: int) -> None:
    driver = CoreDriver(FakeRunner(vocab_size=60, poison_token=55), max_num_tokens=max_num_tokens)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 55]
    for _ in range(2):
        driver.add(prompt)
        driver.run()
    assert len(driver.errors) == 2 and not driver.cached_tokens


def test_what_was_computed_from_the_blocks_of_a_failed_sequence_is_not_found_either() -> None:
    runner = FakeRunner(vocab_size=60, raising_token=55)
    driver = CoreDriver(runner, max_num_tokens=64)
    shared = [1, 2, 3, 4, 5, 6, 7, 8]
    driver.add([*shared, 55])
    prompt = [*shared, *range(30, 39)]
    prompts = {driver.add(prompt): prompt}
    driver.run()
    prompts[driver.add(prompt)] = prompt
    driver.run()
    assert len(driver.errors) == 1
    expect_others_undisturbed(driver, runner, prompts)


def test_a_step_that_does_not_fit_the_memory_runs_in_parts_and_smaller_ones_follow() -> None:
    seen: list[int] = []

    def run_short(inputs: BatchInputs) -> None:
        seen.append(inputs.num_tokens)
        if inputs.num_tokens > 20:
            raise DeviceMemoryError("only room for 20 tokens")

    runner = FakeRunner(on_execute=run_short)
    driver = CoreDriver(runner, max_num_tokens=64)
    prompts = {driver.add(prompt): prompt for prompt in ([1] * 50, [2] * 30, [3, 4])}
    driver.run()
    expect_others_undisturbed(driver, runner, prompts)
    assert not driver.errors and driver.core.get_stats().num_preemptions == 0
    assert sum(num_tokens > 20 for num_tokens in seen) <= 6, "the budget went down with the first failures"


def test_a_budget_goes_down_as_far_as_the_memory_asks_however_many_sequences_may_run() -> None:
    num_failed = 0

    def run_short(inputs: BatchInputs) -> None:
        nonlocal num_failed
        if inputs.num_tokens > 10:
            num_failed += 1
            raise DeviceMemoryError("only room for 10 tokens")

    runner = FakeRunner(num_blocks=256, max_model_len=400, on_execute=run_short)
    driver = CoreDriver(runner, max_num_seqs=64, max_num_tokens=64)
    prompts = {driver.add(prompt): prompt for prompt in ([1] * 300, [2] * 3)}
    driver.run()
    expect_others_undisturbed(driver, runner, prompts)
    assert num_failed <= 12, "64, 32 and 16 tokens do not fit, in parts and once more as the budget is tried again"


def test_steps_are_as_large_as_before_when_the_memory_has_sufficed_for_a_while() -> None:
    seen: list[int] = []

    def run_short_once(inputs: BatchInputs) -> None:
        seen.append(inputs.num_tokens)
        if len(seen) == 1:
            raise DeviceMemoryError("no room this time")

    driver = CoreDriver(FakeRunner(num_blocks=256, on_execute=run_short_once), max_num_tokens=32, prompt_lookup="off")
    driver.add([1] * 32, max_tokens=90)
    for _ in range(STEPS_TO_RECOVER + 1):
        driver.step()
    driver.add([2] * 31, max_tokens=1)
    driver.run()
    assert max(seen[1:]) == 32, "a decode beside the prompt"


def test_a_sequence_that_not_even_alone_fits_the_memory_fails_alone() -> None:
    def run_short(inputs: BatchInputs) -> None:
        if 55 in inputs.input_ids:
            raise DeviceMemoryError("never")

    runner = FakeRunner(vocab_size=60, on_execute=run_short)
    driver = CoreDriver(runner, max_num_tokens=64)
    prompts = {driver.add(prompt): prompt for prompt in ([1] * 10, [2] * 3)}
    failing = driver.add([1] * 10 + [55])
    driver.run()
    assert list(driver.errors) == [failing]
    expect_others_undisturbed(driver, runner, prompts)


def test_a_lost_device_is_nobodys_fault_and_raised() -> None:
    def lose(inputs: BatchInputs) -> None:
        raise DeviceLostError("an illegal memory access was encountered")

    driver = CoreDriver(FakeRunner(on_execute=lose))
    driver.add([1])
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        driver.step()


def test_a_step_in_which_every_sequence_raises_is_raised() -> None:
    def fail(inputs: BatchInputs) -> None:
        raise RuntimeError("broken kernel")

    driver = CoreDriver(FakeRunner(on_execute=fail))
    driver.add([1])
    driver.add([2])
    with pytest.raises(DeviceLostError, match="broken kernel"):
        driver.step()


def test_stats_count_what_was_computed() -> None:
    driver = CoreDriver(FakeRunner(num_blocks=64, block_size=4), max_num_tokens=16)
    driver.add([1] * 10, max_tokens=3)
    driver.step()
    during = driver.core.get_stats()
    assert (during.num_running, during.num_waiting, during.num_kv_blocks_used) == (1, 0, 3)
    driver.run()
    after = driver.core.get_stats()
    assert (after.num_steps, after.num_prompt_tokens, after.num_generated_tokens) == (3, 10, 3)
    assert after.num_kv_blocks_free == after.num_kv_blocks == 64
    assert after.as_dict()["num_running"] == 0


def test_arrays_of_a_step_have_the_types_of_the_message() -> None:
    driver = CoreDriver(FakeRunner())
    driver.add([1, 2])
    for step in (driver.step(), driver.step()):
        assert step.sequence_ids.dtype == np.int64
        assert step.token_ids.dtype == np.int32
        assert step.finish_codes.dtype == np.int8
