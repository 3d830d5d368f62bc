"""The shapes that steps are padded to, and what of a step lies where in them."""

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.runner.batch_inputs import BatchInputs
from engine.runner.memory import largest_step
from engine.runner.step_shapes import StepBuffers, StepShape, choose_shape, decode_bucket, largest_shapes


def inputs_of(query_lens: list[int], contexts: list[int], *, block_size: int = 16) -> BatchInputs:
    """A step whose every array tells its places apart."""
    num_tokens, num_seqs = sum(query_lens), len(contexts)
    inputs = largest_step(EngineConfig(model_path="", max_num_seqs=num_seqs, max_num_tokens=num_tokens), num_tokens)
    width = -(-max(contexts) // block_size)
    inputs.input_ids = np.arange(num_tokens) + 100
    inputs.position_ids = np.arange(num_tokens) + 200
    inputs.slot_mapping = np.arange(num_tokens) + 300
    inputs.query_start = np.cumsum([0, *query_lens]).astype(np.int32)
    inputs.context_lens = np.array(contexts, np.int32)
    inputs.block_tables = np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width)
    inputs.logits_indices = inputs.query_start[1:].astype(np.int64) - 1
    inputs.sampled_positions = np.array(contexts)
    inputs.max_query_len = max(query_lens)
    inputs.scored = None
    return inputs


@pytest.mark.parametrize(
    ("num_seqs", "bucket"), [(1, 2), (2, 2), (3, 4), (5, 8), (9, 16), (66, 80), (249, 256), (257, 288), (512, 512)]
)
def test_decodes_are_padded_to_few_numbers_of_sequences(num_seqs: int, bucket: int) -> None:
    assert decode_bucket(num_seqs) == bucket


def test_a_steps_shape_depends_on_what_a_graph_bakes_in_alone() -> None:
    limits = {"max_num_seqs": 8, "max_blocks": 100}
    decode = choose_shape(inputs_of([1] * 5, [3, 9, 300, 7, 1]), **limits)
    assert decode == StepShape.of_decodes(8, 32)
    assert choose_shape(inputs_of([1] * 7, [300] * 7), **limits) == decode
    assert choose_shape(inputs_of([1], [1600]), **limits) == StepShape.of_decodes(2, 100)
    assert choose_shape(inputs_of([1, 130], [3, 130]), **limits) == StepShape.mixed(256, 8, 16)
    assert choose_shape(inputs_of([3000], [3000]), **limits) == StepShape.mixed(3072, 8, 100)
    assert choose_shape(inputs_of([8193], [8193]), **limits) is None
    limits["max_num_seqs"] = 200
    wide = choose_shape(inputs_of([1] * 3, [3] * 3), **limits, row_step=64)
    assert wide == StepShape.of_decodes(64, 16)
    wide = choose_shape(inputs_of([1, 130], [3, 130]), **limits, row_step=64)
    assert wide == StepShape.mixed(256, 64, 16)
    assert choose_shape(inputs_of([1, 130], [3, 130]), **limits) == StepShape.mixed(256, 16, 16)
    assert choose_shape(inputs_of([1] * 99 + [2], [3] * 100), **limits) == StepShape.mixed(128, 208, 16)
    unsampled = inputs_of([100], [100])
    unsampled.logits_indices = unsampled.logits_indices[:0]
    assert choose_shape(unsampled, **limits) == StepShape.mixed(128, 16, 16)
    scoring = inputs_of([4], [4])
    scoring.scored = largest_step(EngineConfig(model_path="", max_num_seqs=1, max_num_tokens=4), 4).scored
    assert choose_shape(scoring, **limits) is None


@pytest.mark.parametrize(
    ("max_num_tokens", "num_tokens"), [(8, 128), (300, 384), (4200, 4608), (8192, 8192), (9000, 8192)]
)
def test_no_more_memory_is_kept_for_graphs_than_steps_may_have_tokens(max_num_tokens: int, num_tokens: int) -> None:
    largest = largest_shapes(8, max_num_tokens, 100, row_step=64)
    assert largest == [StepShape.of_decodes(64, 100), StepShape.mixed(num_tokens, 64, 100)]


def test_a_step_is_laid_out_anew_and_its_padding_has_no_keys_no_slots_and_no_queries() -> None:
    decode = StepShape.of_decodes(8, 16)
    mixed = StepShape.mixed(128, 8, 16)
    buffers = StepBuffers([decode, mixed], torch.device("cpu"))
    buffers.fill(decode, inputs_of([1] * 8, [9] * 8))
    buffers.fill(mixed, inputs_of([1, 20, 3], [40, 20, 90]))
    tensors = buffers.tensors(mixed)
    assert tensors.input_ids[:25].tolist() == [*range(100, 124), 0]
    assert tensors.position_ids[23] == 223 and tensors.slot_mapping[22:26].tolist() == [322, 323, -1, -1]
    assert tensors.query_start.tolist() == [0, 1, 21, 24, 24, 24, 24, 24, 24, 128], "the last one's are padding"
    assert tensors.context_lens.tolist() == [40, 20, 90, 0, 0, 0, 0, 0, 0]
    assert tensors.logits_indices.tolist() == [0, 20, 23, 0, 0, 0, 0, 0]
    assert tensors.block_tables[:4, :7].tolist() == [[*range(6), 0], [*range(6, 12), 0], [*range(12, 18), 0], [0] * 7]
    buffers.fill(decode, inputs_of([1] * 3, [40, 20, 90]))
    tensors = buffers.tensors(decode)
    assert tensors.slot_mapping.tolist() == [300, 301, 302, -1, -1, -1, -1, -1]
    assert tensors.query_start.tolist() == list(range(9)) and tensors.context_lens.tolist()[2:4] == [90, 0]
    assert not tensors.block_tables[3:].any(), "nothing is left of the step before"
