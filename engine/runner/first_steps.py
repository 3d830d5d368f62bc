"""Steps that a start computes for nobody, so that jobs find every kernel compiled: those that no graph computes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from engine.config import EngineConfig
from engine.runner.batch_inputs import BatchInputs, ScoredTokens
from engine.runner.step_budget import plain_rows, prompts_step

_PROMPT_TOKENS = 2  # with fewer it would be a decode, whose kernels graphs have


def first_steps(config: EngineConfig, num_blocks: int) -> Iterator[BatchInputs]:
    """Prefills of 1, 2, 4, ... sequences: a kernel may be compiled for each of these numbers.

    Each scores a token of a prompt, which leaves it to no graph, and samples one.
    """
    for power in range((config.max_num_seqs - 1).bit_length() + 1):
        num_seqs = min(1 << power, config.max_num_seqs)
        yield _scored(prompts_step(config, _PROMPT_TOKENS * num_seqs, _PROMPT_TOKENS, num_blocks))


def _scored(step: BatchInputs) -> BatchInputs:
    nothing = np.zeros(1, np.int64)
    return replace(
        step,
        logits_indices=step.logits_indices[:1],
        sampled_positions=step.sampled_positions[:1],
        sampling=plain_rows(1),
        scored=ScoredTokens(nothing, nothing, nothing, num_top=0),
    )
