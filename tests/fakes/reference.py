"""transformers' own greedy `generate`, the judge of the engine's tokens, and prompts for both."""

import random
from collections.abc import Sequence
from typing import Any

import torch


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Ids of the tiny models' vocabulary, no special ones."""
    rng = random.Random(0)
    return [[rng.randrange(10, 250) for _ in range(length)] for length in lengths]


def generate(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """What the model says after a prompt."""
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    output: list[int] = tokens[0, len(prompt) :].tolist()
    return output
