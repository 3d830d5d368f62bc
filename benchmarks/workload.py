"""The prompts that every contender of a benchmark gets: random token ids, the same for the same seed."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts[i]` asks for exactly `max_tokens[i]` tokens: end-of-sequence is ignored."""

    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def num_output_tokens(self) -> int:
        return sum(self.max_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def uniform_workload(
    num_prompts: int, prompt_range: tuple[int, int], output_range: tuple[int, int], *, seed: int, end_id: int = 40_000
) -> Workload:
    """`num_prompts` prompts of U(prompt_range) tokens, each asking for U(output_range) tokens."""
    rng = random.Random(seed)
    # Ids 100 to 40,000 are ordinary tokens of SmolLM2's vocabulary of 49,152.
    prompts = [[rng.randrange(100, end_id) for _ in range(rng.randint(*prompt_range))] for _ in range(num_prompts)]
    return Workload(prompts, [rng.randint(*output_range) for _ in range(num_prompts)])
