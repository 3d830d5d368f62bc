"""Steps that a start computes for nobody, so that jobs find every kernel compiled: those that no graph computes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from engine.config import EngineConfig
from engine.runner.batch_inputs import BatchInputs, ScoredTokens
from engine.runner.step_budget import plain_rows, prompts_step

_PROMPT_TOKENS = 2  # with fewer it would be a decode


def first_steps(
    config: EngineConfig, num_blocks: int, *, max_model_len: int, has_graphs: bool
) -> Iterator[BatchInputs]:
    """Steps of 1, 2, 4, ... sequences: a kernel may be compiled for each of these numbers.

    Prefills, each of which scores a token of a prompt, which leaves it to no graph, and samples one. Without graphs
    decodes, too, of contexts of 1, 2, 4, ... blocks: kernels go with the longest one. In fact each context is a token,
    so that none of these steps takes long.
    """
    for num_seqs in _powers(config.max_num_seqs):
        yield _scored(prompts_step(config, _PROMPT_TOKENS * num_seqs, _PROMPT_TOKENS, num_blocks))
        if has_graphs:
            continue
        for width in _powers(-(-max_model_len // config.block_size)):
            yield replace(prompts_step(config, num_seqs, 1, num_blocks), max_context_len=width * config.block_size)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and the last of all."""
    return [min(1 << power, most) for power in range((most - 1).bit_length() + 1)]


def _scored(step: BatchInputs) -> BatchInputs:
    nothing = np.zeros(1, np.int64)
    return replace(
        step,
        logits_indices=step.logits_indices[:1],
        sampled_positions=step.sampled_positions[:1],
        sampling=plain_rows(1),
        scored=ScoredTokens(nothing, nothing, nothing, num_top=0),
    )
