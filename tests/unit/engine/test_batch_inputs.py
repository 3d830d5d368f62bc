"""The packed arrays equal what plain loops over the sequences give."""

import random

import numpy as np
import pytest

from engine.kv_cache.manager import KVCacheManager
from engine.messages import AddSequence
from engine.runner.batch_inputs import BatchBuilder, BatchInputs
from engine.runner.slots import SequenceSlots
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceLimits, create_sequence
from engine.step_plan import StepPlan, StepResult
from engine.step_recorder import StepRecorder
from engine.token_budget import TokenBudget

BLOCK_SIZE = 4
LIMITS = SequenceLimits(vocab_size=100, max_len=64, eos_token_ids=(), described="")


class World:
    def __init__(self) -> None:
        self.slots = SequenceSlots(max_num_seqs=4, max_len=64, block_size=BLOCK_SIZE)
        kv = KVCacheManager(self.slots, 64, prefix_caching=False)
        self.scheduler = Scheduler(self.slots, kv, TokenBudget(24, few_prefill_tokens=None))
        self.recorder = StepRecorder(self.slots, kv, self.scheduler)
        self.builder = BatchBuilder(self.slots)
        self.rng = random.Random(5)

    def add(self, sequence_id: int, num_prompt_tokens: int, params: SamplingParams) -> None:
        prompt = [self.rng.randrange(100) for _ in range(num_prompt_tokens)]
        message = AddSequence(sequence_id=sequence_id, prompt_token_ids=prompt, params=params, choice_index=sequence_id)
        self.scheduler.add(create_sequence(message, LIMITS))

    def build(self) -> tuple[StepPlan, BatchInputs]:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan, self.builder.build(plan)

    def record(self, plan: StepPlan) -> None:
        tokens = np.array([self.rng.randrange(100) for _ in range(len(plan.sampled))], np.int64)
        self.recorder.record(plan, StepResult(token_ids=tokens))


def check_against_loops(world: World, plan: StepPlan, inputs: BatchInputs) -> None:
    slots = world.slots
    tokens, positions, pages, context_lens, logits = [], [], [], [], []
    for slot, start, num_new in zip(plan.slots.tolist(), plan.starts.tolist(), plan.num_new.tolist(), strict=True):
        for position in range(start, start + num_new):
            tokens.append(slots.token_ids[slot, position])
            positions.append(position)
            block = slots.block_tables[slot, position // BLOCK_SIZE]
            pages.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        context_lens.append(start + num_new)
        if start + num_new == slots.num_tokens[slot]:
            logits.append(len(tokens) - 1)
    assert inputs.input_ids.tolist() == tokens and inputs.position_ids.tolist() == positions
    assert inputs.slot_mapping.tolist() == pages and len(set(pages)) == len(pages)
    assert inputs.context_lens.tolist() == context_lens
    assert np.diff(inputs.query_start).tolist() == plan.num_new.tolist() and inputs.query_start[0] == 0
    assert inputs.logits_indices.tolist() == logits
    assert inputs.sampled_positions.tolist() == slots.num_tokens[inputs.sampling.slots].tolist()
    assert (inputs.num_seqs, inputs.num_tokens) == (len(plan.slots), len(tokens))
    assert (inputs.max_query_len, inputs.max_context_len) == (max(plan.num_new), max(context_lens))
    for row, slot in enumerate(plan.slots.tolist()):
        num_blocks = -(-context_lens[row] // BLOCK_SIZE)
        assert inputs.block_tables[row, :num_blocks].tolist() == slots.block_tables[slot, :num_blocks].tolist()


def test_arrays_equal_plain_loops_in_prefill_decode_and_mixed_steps() -> None:
    world = World()
    kinds = set()
    for sequence_id, (num_prompt_tokens, max_tokens) in enumerate([(30, 5), (3, 20), (17, 9), (1, 12), (40, 2)]):
        world.add(sequence_id, num_prompt_tokens, SamplingParams(max_tokens=max_tokens))
    while world.scheduler.num_running or world.scheduler.num_waiting:
        plan, inputs = world.build()
        check_against_loops(world, plan, inputs)
        kinds.add((plan.num_decodes > 0, plan.num_rows > plan.num_decodes, len(plan.sampled) > plan.num_decodes))
        world.record(plan)
        world.scheduler.check_integrity()
    assert {(False, True, True), (True, False, False), (True, True, False), (True, True, True)} <= kinds


def test_sampling_rows_carry_each_sequences_own_parameters() -> None:
    world = World()
    world.add(0, 2, SamplingParams(temperature=0.5, top_k=7, seed=2**63 + 5))
    world.add(1, 2, SamplingParams(top_p=0.25, min_p=0.125, seed=-3))
    _, inputs = world.build()
    rows = inputs.sampling
    assert rows.sequence_ids.tolist() == [0, 1] and rows.choice.tolist() == [0, 1]
    assert rows.temperature.tolist() == [0.5, 1.0] and rows.top_k.tolist() == [7, 0]
    assert rows.top_p.tolist() == [1.0, 0.25] and rows.min_p.tolist() == [0.0, 0.125]
    assert rows.seed.tolist() == [-(2**63) + 5, -3]


def test_the_rows_of_a_decode_are_gathered_once_for_as_long_as_nobody_joins_or_leaves() -> None:
    world = World()
    for sequence_id, max_tokens in enumerate([10, 3]):
        world.add(sequence_id, 3, SamplingParams(max_tokens=max_tokens))
    sampling = []
    for _ in range(5):
        plan, inputs = world.build()
        sampling.append(inputs.sampling)
        world.record(plan)
    assert sampling[1] is sampling[2] and sampling[2] is not sampling[3] and sampling[3] is sampling[4]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64, 2**64 - 1, 12345678901234567890])
def test_seeds_are_equal_modulo_64_bits(seed: int) -> None:
    world = World()
    world.add(0, 1, SamplingParams(seed=seed))
    _, inputs = world.build()
    assert int(inputs.sampling.seed[0]) % 2**64 == seed % 2**64
