"""Counts of tokens equal what counting the sequence gives, however it grew."""

import random
from collections import Counter

import numpy as np

from engine.runner.token_counts import TokenCounts

NUM_SLOTS, MAX_LEN, VOCAB_SIZE = 4, 100, 12


def counted(counts: TokenCounts, slots: list[int]) -> list[dict[int, int]]:
    found: list[dict[int, int]] = [{} for _ in slots]
    for owner, token_id, count in zip(*counts.entries(np.array(slots)), strict=True):
        assert int(token_id) not in found[owner], "a token stands twice"
        found[owner][int(token_id)] = int(count)
    return found


def expected(table: np.ndarray, slot: int, num_prompt: int, num_tokens: int, *, with_prompt: bool) -> dict[int, int]:
    tokens = table[slot, :num_tokens].tolist()
    known = dict.fromkeys(tokens[:num_prompt], 0) if with_prompt else {}
    return known | dict(Counter(tokens[num_prompt:]))


def test_counts_follow_the_token_table_step_by_step_and_from_any_point() -> None:
    rng = random.Random(3)
    table = np.array([[rng.randrange(VOCAB_SIZE) for _ in range(MAX_LEN)] for _ in range(NUM_SLOTS)], np.int32)
    prompts, with_prompt = [10, 1, 25, 7], [True, False, True, False]
    counts = TokenCounts(table)
    lengths = list(prompts)
    for slot in range(NUM_SLOTS):
        counts.open(slot, num_prompt_tokens=prompts[slot], num_tokens=prompts[slot], with_prompt=with_prompt[slot])
    for _ in range(30):
        slots = rng.sample(range(NUM_SLOTS), rng.randrange(1, NUM_SLOTS + 1))
        for slot in slots:
            lengths[slot] += rng.choice([1, 1, 2])
        counts.advance(np.array(slots), np.array([lengths[slot] for slot in slots]))
        if rng.random() < 0.2:  # preempted, and back in its slot
            counts.open(
                slots[0],
                num_prompt_tokens=prompts[slots[0]],
                num_tokens=lengths[slots[0]],
                with_prompt=with_prompt[slots[0]],
            )
        wanted = [expected(table, s, prompts[s], lengths[s], with_prompt=with_prompt[s]) for s in slots]
        assert counted(counts, slots) == wanted
