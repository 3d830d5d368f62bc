"""Which shape a step is padded to, so that few CUDA graphs serve all steps, and where its arrays lie for each shape.

Decodes are padded to a number of sequences, mixed steps to a number of tokens; both to a width of block tables, since a
decode's splits follow from it. Padding rows have no keys and no slot. Knows nothing of graphs or of models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.runner.batch_inputs import BatchInputs

MIN_SEQS = 2  # matrix libraries take another path for a single row
MAX_MIXED_TOKENS = 2048  # beyond, the device computes for longer than the host takes to launch
_MIXED_STEP = 128  # tokens
_MIN_BLOCKS = 16  # of a block table
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph has baked in."""

    num_tokens: int
    num_seqs: int
    max_blocks: int  # width of the block tables
    num_logits: int
    is_decode: bool


def choose_shape(inputs: BatchInputs, *, max_num_seqs: int, max_blocks: int) -> StepShape | None:
    """The shape of a step; None for one that is run as it is: a long prefill, or one that scores a prompt."""
    if inputs.scored is not None or not len(inputs.logits_indices):
        return None
    width = min(max(_power_of_two(inputs.block_tables.shape[1]), _MIN_BLOCKS), max_blocks)
    if inputs.max_query_len == 1:
        num_seqs = decode_bucket(inputs.num_seqs)
        return StepShape(num_seqs, num_seqs, width, num_seqs, is_decode=True)
    if inputs.num_tokens > MAX_MIXED_TOKENS or len(inputs.logits_indices) > max_num_seqs:
        return None
    num_tokens = -(-inputs.num_tokens // _MIXED_STEP) * _MIXED_STEP
    num_seqs = decode_bucket(max_num_seqs)
    return StepShape(num_tokens, num_seqs, width, num_seqs, is_decode=False)


def decode_bucket(num_seqs: int) -> int:
    """2, 4, then multiples of 8 to 256 and of 16 beyond."""
    if num_seqs <= 4:
        return max(MIN_SEQS, _power_of_two(num_seqs))
    step = 8 if num_seqs <= 256 else 16
    return -(-num_seqs // step) * step


class StepBuffers:
    """One piece of device memory that every shape lays its inputs into, and pinned copies of it on the host."""

    def __init__(self, shapes: list[StepShape], device: torch.device) -> None:
        """`shapes`: the largest that will be asked for."""
        num_bytes = max(sum(_aligned(array.nbytes) for _, array in _arrays(shape)) for shape in shapes)
        is_cuda = device.type == "cuda"
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # Two: one may still be on its way while the next step is written.
        self._hosts = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._hosts if is_cuda]  # type: ignore[no-untyped-call]
        self._turn = 0

    def fill(self, shape: StepShape, inputs: BatchInputs) -> None:
        """Copy a step's arrays, padded to its shape, without waiting for the device to take them."""
        self._turn = (self._turn + 1) % len(self._hosts)
        if self._copied:
            self._copied[self._turn].synchronize()  # two steps ago: done long since
        host = self._hosts[self._turn]
        end = 0
        for (name, template), array in zip(_arrays(shape), _views(shape, host.numpy()), strict=True):
            values = _values(name, inputs)
            array[...] = template
            array[tuple(slice(0, size) for size in values.shape)] = values
            end += _aligned(array.nbytes)
        if not shape.is_decode:  # sequences behind the last one have no queries
            _query_start(shape, host.numpy())[inputs.num_seqs :] = inputs.num_tokens
        self._device[:end].copy_(host[:end], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()

    def tensors(self, shape: StepShape) -> "StepTensors":
        """The inputs of a shape, as views of the device's memory."""
        offset = 0
        tensors = []
        for _, array in _arrays(shape):
            dtype = torch.from_numpy(array[:0]).dtype
            tensors.append(self._device[offset : offset + array.nbytes].view(dtype).view(array.shape))
            offset += _aligned(array.nbytes)
        return StepTensors(*tensors)


@dataclass(slots=True)
class StepTensors:
    """A step's inputs on the device, in the order in which they lie there."""

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    logits_indices: Tensor
    sampled_positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor

    def batch(self, shape: StepShape, block_size: int) -> AttentionBatch:
        """The step as its attention sees it: every number on the host is the shape's, not the step's."""
        return AttentionBatch(
            query_start=self.query_start,
            context_lens=self.context_lens,
            block_tables=self.block_tables,
            slot_mapping=self.slot_mapping,
            num_seqs=shape.num_seqs,
            num_tokens=shape.num_tokens,
            max_query_len=1 if shape.is_decode else shape.num_tokens,
            max_context_len=shape.max_blocks * block_size,
        )


def _arrays(shape: StepShape) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Name and padding of every input."""
    for name, padding in (("input_ids", 0), ("position_ids", 0), ("slot_mapping", -1)):
        yield name, np.full(shape.num_tokens, padding, np.int64)
    for name in ("logits_indices", "sampled_positions"):
        yield name, np.zeros(shape.num_logits, np.int64)
    yield "query_start", np.arange(shape.num_seqs + 1, dtype=np.int32)
    yield "context_lens", np.zeros(shape.num_seqs, np.int32)
    yield "block_tables", np.zeros((shape.num_seqs, shape.max_blocks), np.int32)


def _values(name: str, inputs: BatchInputs) -> NDArray[np.generic]:
    values: NDArray[np.generic] = getattr(inputs, name)
    return values


def _views(shape: StepShape, memory: NDArray[np.uint8]) -> Iterator[NDArray[np.generic]]:
    offset = 0
    for _, array in _arrays(shape):
        yield memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        offset += _aligned(array.nbytes)


def _query_start(shape: StepShape, memory: NDArray[np.uint8]) -> NDArray[np.generic]:
    names = [name for name, _ in _arrays(shape)]
    return list(_views(shape, memory))[names.index("query_start")]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
