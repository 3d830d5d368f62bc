"""Whatever happens to the others, a sequence gives what it gives alone, and nothing leaks.

Hypothesis drives a core over a fake runner whose pages are hashes of prefixes: arrivals, forks, aborts, resumptions,
priorities, pools too small for the load, steps that do not fit the memory, prompts that make the model raise or give
bad logits. `check_integrity()` runs after each step.
"""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import waiting_queue
from engine.errors import DeviceMemoryError
from engine.messages import FinishCode
from engine.runner.batch_inputs import BatchInputs
from engine.waiting_queue import MAX_OVERTAKINGS
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output
from tests.fakes.fake_runner_ahead import FakeRunnerAhead

POISON, RAISING = 10, 11  # tokens that the model itself is not asked to say
tokens = st.integers(0, 2)  # few, so that prefixes meet


class CoreMachine(RuleBasedStateMachine):
    """Compares every sequence with its undisturbed output."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[int, list[int]] = {}  # of the sequences that are to finish
        self.prompts: list[list[int]] = [[0]]
        self.failing: dict[int, list[int]] = {}  # prompts by sequence id
        self.memory = 1 << 30  # tokens that fit a step

    @initialize(
        num_blocks=st.integers(2, 14) | st.integers(30, 60),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 12) | st.integers(30, 100),
        few_prefill_tokens=st.none() | st.integers(1, 20),
        prefix_caching=st.booleans(),
        prompt_lookup=st.sampled_from(["on", "off"]),
        runner_class=st.sampled_from([FakeRunner, FakeRunnerAhead]),
        max_overtakings=st.sampled_from([1, 16]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        extra_tokens: int,
        few_prefill_tokens: int | None,
        prefix_caching: bool,
        prompt_lookup: str,
        runner_class: type[FakeRunner],
        max_overtakings: int,
    ) -> None:
        waiting_queue.MAX_OVERTAKINGS = max_overtakings
        self.runner = runner_class(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=40,
            vocab_size=12,
            few_prefill_tokens=few_prefill_tokens,
            poison_token=POISON,
            raising_token=RAISING,
            on_execute=self._maybe_run_short,
        )
        self.driver = CoreDriver(
            self.runner,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_seqs + extra_tokens,
            prefix_caching=prefix_caching,
            prompt_lookup=prompt_lookup,
        )

    def _maybe_run_short(self, inputs: BatchInputs) -> None:
        if inputs.num_tokens > self.memory:
            raise DeviceMemoryError("out of memory")

    @rule(
        prompt=st.lists(tokens, min_size=1, max_size=30),
        max_tokens=st.integers(1, 12) | st.none(),
        priority=st.integers(-1, 2),
        seed=st.integers(0, 2),
        deadline=st.none() | st.integers(0, 2),
        num_resumed=st.integers(0, 6),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int | None,
        priority: int,
        seed: int,
        deadline: int | None,
        num_resumed: int,
    ) -> None:
        self._add(prompt, max_tokens, priority=priority, deadline=deadline, seed=seed, num_resumed=num_resumed)

    @rule(index=st.integers(0, 50), tail=st.lists(tokens, max_size=8), key=st.sampled_from(["", "other"]))
    def go_on(self, index: int, tail: list[int], key: str) -> None:
        self._add(self.prompts[index % len(self.prompts)] + tail, 6, cache_key=key)

    @rule(
        index=st.integers(0, 50),
        tail=st.lists(tokens, max_size=20),
        priority=st.integers(-1, 2),
        num_resumed=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    )
    def fork(self, index: int, tail: list[int], priority: int, num_resumed: list[int]) -> None:
        prompt, group = self.prompts[index % len(self.prompts)] + tail, self.driver.num_added
        for choice, num in enumerate(num_resumed):
            self._add(prompt, 8, priority=priority, choice=choice, group=group, num_resumed=num)

    @rule(index=st.integers(0, 50), spoiler=st.sampled_from([POISON, RAISING]))
    def add_failing(self, index: int, spoiler: int) -> None:
        self._add([*self.prompts[index % len(self.prompts)], spoiler, 1], 6)

    @precondition(lambda self: self.expected)
    @rule(index=st.integers(0, 1000))
    def abort(self, index: int) -> None:
        sequence_id = sorted(self.expected)[index % len(self.expected)]
        if sequence_id not in self.driver.finished:
            self.driver.core.abort([sequence_id])
            del self.expected[sequence_id]

    @rule(num_tokens=st.integers(1, 10))
    def lower_memory(self, num_tokens: int) -> None:
        self.memory = num_tokens

    @rule()
    def restore_memory(self) -> None:
        self.memory = 1 << 30

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @invariant()
    def outputs_so_far_are_undisturbed(self) -> None:
        for sequence_id, expected in self.expected.items():
            output = self.driver.outputs[sequence_id]
            assert output == expected[: len(output)]
            if sequence_id in self.driver.finished:
                assert output == expected and self.driver.finished[sequence_id] is FinishCode.LENGTH

    def teardown(self) -> None:
        waiting_queue.MAX_OVERTAKINGS = MAX_OVERTAKINGS
        if not hasattr(self, "driver"):
            return
        self.driver.run()
        self.outputs_so_far_are_undisturbed()
        assert set(self.driver.finished) == set(self.expected) | set(self.failing), "somebody never finished"
        assert set(self.driver.errors) == set(self.failing)
        stats = self.driver.core.get_stats()
        assert stats.num_kv_blocks_used == 0 and stats.num_running == stats.num_waiting == 0

    def _add(
        self,
        prompt: list[int],
        max_tokens: int | None,
        *,
        seed: int = 0,
        choice: int = 0,
        num_resumed: int = 0,
        **fields: Any,
    ) -> None:
        info = self.runner.info
        prompt = prompt[-(info.max_model_len - 1) :]
        is_failing = POISON in prompt or RAISING in prompt
        if info.max_model_len < 2 or (RAISING in prompt and self._a_raising_one_runs()):
            return
        limit = info.max_model_len if max_tokens is None else max_tokens
        expected = [] if is_failing else undisturbed_output(info, prompt, max_tokens=limit, seed=seed, choice=choice)
        if {POISON, RAISING} & set(expected):
            return
        resumed = expected[: min(num_resumed, max(len(expected) - 1, 0))]
        sequence_id = self.driver.add(prompt, max_tokens=max_tokens, seed=seed, choice=choice, output=resumed, **fields)
        if is_failing:
            self.failing[sequence_id] = prompt
        else:
            self.expected[sequence_id] = expected
            self.prompts.append(prompt)

    def _a_raising_one_runs(self) -> bool:
        """Two alone in a step would count as a broken device, which is tested elsewhere."""
        return any(RAISING in prompt and i not in self.driver.finished for i, prompt in self.failing.items())


CoreMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestCoreMachine = CoreMachine.TestCase


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_thousands_of_steps_under_random_load_leak_nothing(prefix_caching: bool) -> None:
    rng = random.Random(11)
    runner = FakeRunner(num_blocks=20, block_size=4, vocab_size=50)
    driver = CoreDriver(runner, max_num_seqs=6, max_num_tokens=16, prefix_caching=prefix_caching)
    expected: dict[int, list[int]] = {}
    live: list[int] = []
    roots = [[rng.randrange(50) for _ in range(20)] for _ in range(4)]
    for _ in range(2000):
        if len(live) < 20 and rng.random() < 0.5:
            prompt = rng.choice(roots)[: rng.randint(1, 20)] + [rng.randrange(50) for _ in range(rng.randint(0, 9))]
            max_tokens, seed, priority = rng.randint(1, 30), rng.randrange(3), rng.randrange(3)
            group, num_choices = driver.num_added, rng.choice([1, 1, 3])
            for choice in range(num_choices):
                output = undisturbed_output(runner.info, prompt, max_tokens=max_tokens, seed=seed, choice=choice)
                sequence_id = driver.add(
                    prompt,
                    max_tokens=max_tokens,
                    seed=seed,
                    choice=choice,
                    group=group if num_choices > 1 else None,
                    priority=priority,
                    output=output[: rng.randrange(len(output))] if rng.random() < 0.2 else [],
                )
                expected[sequence_id] = output
                live.append(sequence_id)
        if live and rng.random() < 0.05:
            sequence_id = live.pop(rng.randrange(len(live)))
            driver.core.abort([sequence_id])
            del expected[sequence_id]
        driver.step()
        live = [sequence_id for sequence_id in live if sequence_id not in driver.finished]
    driver.run()
    stats = driver.core.get_stats()
    assert all(driver.outputs[sequence_id] == output for sequence_id, output in expected.items())
    assert stats.num_preemptions > 100 and stats.num_kv_blocks_used == 0
    assert stats.num_cached_tokens > (1000 if prefix_caching else 300)
