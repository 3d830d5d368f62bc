"""How many prompt tokens a step computes by default: the fewest with which it computes them about as fast.

A step's tokens come when it ends, so a shorter one brings first tokens sooner and holds up decodes for less; too short
a one leaves the device idle between steps, or reads weights for too few rows. Where that is depends, on a GPU, on the
model and the device, so it is measured at start; on a CPU on what a core's products need. Knows nothing of devices: it
is handed a way to run a step.
"""

import logging
import time
from collections.abc import Callable
from math import inf

import numpy as np

from engine.config import EngineConfig
from engine.errors import DeviceMemoryError
from engine.model.loader import LoadedModel
from engine.runner.batch_inputs import BatchInputs
from engine.runner.slots import SlotRows

logger = logging.getLogger(__name__)

LEAST_TOKENS = 512
_SPEED_TO_KEEP = 0.95  # of the largest step's tokens a second
_PROMPT_TOKENS = 512
# 8 prompts on two cores: with 128 tokens a step first tokens come a fifth sooner than with 512, for 0% (int8) to 4%
# (bfloat16) more CPU time. More threads wait for each other more often in a short step.
_CPU_TOKENS_A_THREAD = 64
_NUM_RUNS = 3  # the first compiles, the second captures a graph


def measure_step_tokens(
    config: EngineConfig, model: LoadedModel, num_blocks: int, run: Callable[[BatchInputs], None]
) -> int:
    """Tokens of a step on the model's device; run: computes a step over its cache of `num_blocks`, to the end."""

    def step_seconds(num_tokens: int) -> float:
        inputs = prefill_step(config, num_tokens, model.max_model_len, num_blocks)
        begun = time.perf_counter()
        try:
            run(inputs)
        except DeviceMemoryError:  # as where more blocks were asked for than leave room: shorter ones may run
            return inf
        return time.perf_counter() - begun

    chosen = choose_step_tokens(config.step_tokens(str(model.device)), config.max_num_seqs, step_seconds)
    logger.info("action=step_measured max_num_tokens=%d", chosen)
    return chosen


def few_prefill_tokens(num_threads: int) -> int:
    """Prompt tokens of a step on a CPU while few prompts wait."""
    return min(LEAST_TOKENS, _CPU_TOKENS_A_THREAD * num_threads)


def choose_step_tokens(most: int, max_num_seqs: int, step_seconds: Callable[[int], float]) -> int:
    """Tokens of a step, `most` at most: the prompt tokens that are enough, and every decode beside them.

    step_seconds: of a step of so many prompt tokens.
    """

    def speed(num_tokens: int) -> float:
        return num_tokens / [step_seconds(num_tokens) for _ in range(_NUM_RUNS)][-1]

    chosen, least_speed = most, _SPEED_TO_KEEP * speed(most)
    while (shorter := chosen // 2) >= LEAST_TOKENS and speed(shorter) >= least_speed:
        chosen = shorter
    return min(most, chosen + max_num_seqs)


def prefill_step(config: EngineConfig, num_tokens: int, max_model_len: int, num_blocks: int) -> BatchInputs:
    """The inputs of a step of prompts of some hundred tokens."""
    return prompts_step(config, num_tokens, min(_PROMPT_TOKENS, max_model_len, num_tokens), num_blocks)


def prompts_step(config: EngineConfig, num_tokens: int, length: int, num_blocks: int) -> BatchInputs:
    """The inputs of a step of prompts of this length, the last perhaps shorter, each of which yields a greedy token."""
    lengths = np.full(-(-num_tokens // length), length, np.int64)
    lengths[-1] = num_tokens - int(lengths[:-1].sum())
    positions = np.concatenate([np.arange(size) for size in lengths])
    width = -(-length // config.block_size)
    tables = np.arange(len(lengths) * width).reshape(len(lengths), width) % num_blocks
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    blocks = tables[sequence, positions // config.block_size]
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return BatchInputs(
        input_ids=np.zeros(num_tokens, np.int64),
        position_ids=positions,
        slot_mapping=blocks * config.block_size + positions % config.block_size,
        query_start=query_start,
        context_lens=lengths.astype(np.int32),
        block_tables=tables.astype(np.int32),
        stays=np.zeros(len(lengths), np.int64),
        logits_indices=query_start[1:].astype(np.int64) - 1,
        sampled_positions=lengths,
        sampling=plain_rows(len(lengths)),
        max_query_len=int(lengths.max()),
        max_context_len=int(lengths.max()),
    )


def plain_rows(num_rows: int) -> SlotRows:
    """Greedy rows of nobody's."""
    zeros, floats = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
    return SlotRows(
        slots=zeros,
        sequence_ids=zeros,
        max_totals=zeros,
        stop_ids=np.zeros((0, num_rows), np.int32),
        long_stops=[],
        constrained=zeros[:0],
        token_offsets=zeros,
        block_offsets=zeros,
        temperature=floats,
        top_p=floats + 1,
        top_k=zeros,
        min_p=floats,
        seed=zeros,
        choice=zeros,
    )
