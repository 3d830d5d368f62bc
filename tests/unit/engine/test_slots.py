"""A slot that is taken again has nothing of the sequence that it held before."""

from dataclasses import asdict
from typing import Any

import numpy as np

from engine.messages import AddSequence
from engine.runner.slots import STOP_TABLE_WIDTH, SequenceSlots
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceLimits, create_sequence

LIMITS = SequenceLimits(vocab_size=100, max_len=64, eos_token_ids=(1, 2), described="a test")
PLAIN = SamplingParams(max_tokens=5, ignore_eos=True)
DEMANDING = [
    SamplingParams(max_tokens=5, stop_token_ids=(7, 8, 9), logprobs=3, temperature=0.7, top_p=0.5, top_k=3, seed=5),
    SamplingParams(max_tokens=5, stop_token_ids=tuple(range(10, 11 + STOP_TABLE_WIDTH)), prompt_logprobs=1),
    SamplingParams(max_tokens=5, presence_penalty=1.0, logit_bias=((3, 1.0),), min_tokens=2, min_p=0.1),
]


def make_slots() -> SequenceSlots:
    return SequenceSlots(max_num_seqs=1, max_len=LIMITS.max_len, block_size=4)


def sequence_of(params: SamplingParams) -> Sequence:
    num_scored = None if params.prompt_logprobs is None else 0
    message = AddSequence(sequence_id=0, prompt_token_ids=[20, 21, 22], params=params, num_scored=num_scored)
    return create_sequence(message, LIMITS)


def described(slots: SequenceSlots) -> dict[str, Any]:
    """All that is known of its only slot. A stop table that was wider once has more padding, which says nothing."""
    rows = asdict(slots.rows(np.array([0])))
    rows["stop_ids"] = {token_id for token_id in rows["stop_ids"][:, 0].tolist() if token_id >= 0}
    known = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in rows.items()}
    starts_and_ends = slots.score_starts.tolist(), slots.score_ends.tolist()
    return known | {"scores": (slots.is_scoring, *starts_and_ends), "uncomputed": slots.num_uncomputed([0])}


def test_a_top_k_beyond_any_vocabulary_takes_all_its_tokens() -> None:
    for top_k, kept in ((2**70, 2**31 - 1), (2**31, 2**31 - 1), (7, 7), (None, 0)):
        slots = make_slots()
        slots.acquire(sequence_of(SamplingParams(top_k=top_k)))
        assert slots.rows(np.array([0])).top_k.tolist() == [kept]


def test_a_slot_that_is_taken_again_is_as_a_new_one() -> None:
    fresh = make_slots()
    fresh.acquire(sequence_of(PLAIN))
    used = make_slots()
    for params in DEMANDING:
        slot = used.acquire(sequence_of(params))
        assert described(used) != described(fresh)
        used.num_computed[slot] = 3
        used.release(slot)
    used.acquire(sequence_of(PLAIN))
    assert described(used) == described(fresh)
