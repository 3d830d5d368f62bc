"""Which shape a step is padded to, so that few CUDA graphs serve all steps, and where its arrays lie for each shape.

Decodes are padded to a number of sequences, mixed steps to a number of tokens and, more coarsely, of sequences; both to
a width of block tables, since a decode's splits follow from it. Padding rows have no keys and no slot, but each is some
sequence's: what attends to nothing comes out as zeros, where a row of nobody's would be whatever its memory held. Knows
nothing of graphs or of models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.runner.batch_inputs import BatchInputs

MIN_SEQS = 2  # matrix libraries take another path for a single row
MAX_MIXED_TOKENS = 8192  # with fewer, a small model's step computes for less long than the host takes to launch it
_MIXED_STEP = 128  # tokens
_MIN_BLOCKS = 16  # of a block table
_BLOCKS_FACTOR = 2  # from one width to the next: programs for keys that there are none of end at once, but take a turn
_MIN_MIXED_SEQS = 16
_MIXED_SEQS_FACTOR = 4  # from one number to the next: a mixed step's graph also serves any division into sequences
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph has baked in."""

    num_tokens: int
    num_seqs: int
    max_blocks: int  # width of the block tables
    num_logits: int
    is_decode: bool

    @classmethod
    def of_decodes(cls, num_seqs: int, max_blocks: int) -> "StepShape":
        """Each sequence has a token, and samples the next."""
        return cls(num_seqs, num_seqs, max_blocks, num_seqs, is_decode=True)

    @classmethod
    def mixed(cls, num_tokens: int, num_seqs: int, max_blocks: int) -> "StepShape":
        """`num_seqs` of a step at most, and a last one behind them that has the padding tokens."""
        return cls(num_tokens, num_seqs + 1, max_blocks, num_seqs, is_decode=False)


def choose_shape(inputs: BatchInputs, *, max_num_seqs: int, max_blocks: int, row_step: int = 1) -> StepShape | None:
    """The shape of a step; None for one that is run as it is: a long prefill, or one that gives more than logits of
    the tokens it samples from.

    row_step: the number of sequences, and with it that of a decode's tokens, is a multiple of it.
    """
    if inputs.scored is not None or inputs.pooled is not None:
        return None
    width = min(_bucket(inputs.block_tables.shape[1], _MIN_BLOCKS, _BLOCKS_FACTOR), max_blocks)
    if inputs.max_query_len == 1:
        return StepShape.of_decodes(decode_bucket(inputs.num_seqs, row_step), width)
    if inputs.num_tokens > MAX_MIXED_TOKENS or len(inputs.logits_indices) > max_num_seqs:
        return None
    num_tokens = mixed_bucket(inputs.num_tokens)
    num_seqs = max(inputs.num_seqs, len(inputs.logits_indices))
    return StepShape.mixed(num_tokens, _mixed_seqs(num_seqs, max_num_seqs, row_step), width)


def largest_shapes(max_num_seqs: int, max_num_tokens: int, max_blocks: int, *, row_step: int = 1) -> list[StepShape]:
    """Of decodes, and of mixed steps: what others take of memory, these take too."""
    num_seqs = decode_bucket(max_num_seqs, row_step)
    num_tokens = mixed_bucket(min(max_num_tokens, MAX_MIXED_TOKENS))
    return [StepShape.of_decodes(num_seqs, max_blocks), StepShape.mixed(num_tokens, num_seqs, max_blocks)]


def every_table(max_num_seqs: int, max_blocks: int, *, row_step: int = 1) -> Iterator[StepShape]:
    """All shapes but mixed ones of more tokens, wide block tables and many sequences first."""
    sizes = {decode_bucket(number, row_step) for number in range(1, max_num_seqs + 1)}
    mixed = {_mixed_seqs(number, max_num_seqs, row_step) for number in range(1, max_num_seqs + 1)}
    width = max_blocks
    while True:
        yield from (StepShape.of_decodes(number, width) for number in sorted(sizes, reverse=True))
        yield from (StepShape.mixed(_MIXED_STEP, number, width) for number in sorted(mixed, reverse=True))
        if width <= _MIN_BLOCKS:
            return
        width = _bucket(-(-width // _BLOCKS_FACTOR), _MIN_BLOCKS, _BLOCKS_FACTOR)


def decode_bucket(num_seqs: int, row_step: int = 1) -> int:
    """2, 4, then multiples of 8 to 64, of 16 to 256, of 32 beyond: all wait while a graph for each is captured."""
    if num_seqs <= 4:
        return _multiple(_bucket(num_seqs, MIN_SEQS, 2), row_step)
    step = 8 if num_seqs <= 64 else 16 if num_seqs <= 256 else 32
    return _multiple(_multiple(num_seqs, step), row_step)


def mixed_bucket(num_tokens: int) -> int:
    """Multiples of 128 to 2048, of 256 to 4096, of 512 beyond: of longer ones a ninth is padding at most."""
    return _multiple(num_tokens, _MIXED_STEP * (1 if num_tokens <= 2048 else 2 if num_tokens <= 4096 else 4))


class StepBuffers:
    """One piece of device memory that every shape lays its inputs into, and pinned copies of it on the host."""

    def __init__(self, shapes: list[StepShape], device: torch.device) -> None:
        """`shapes`: the largest that will be asked for."""
        num_bytes = max(_num_bytes(shape) for shape in shapes)
        is_cuda = device.type == "cuda"
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # Two: one may still be on its way while the next step is written.
        self._hosts = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._hosts if is_cuda]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._tensors: dict[StepShape, StepTensors] = {}
        self._arrays: dict[StepShape, list[dict[str, NDArray[np.generic]]]] = {}

    def fill(self, shape: StepShape, inputs: BatchInputs | None) -> None:
        """Copy a step's arrays, padded to its shape, without waiting for the device; None: padding alone."""
        self._turn = (self._turn + 1) % len(self._hosts)
        if self._copied:
            self._copied[self._turn].synchronize()  # two steps ago: done long since
        for name, array in self._host_arrays(shape).items():
            values: NDArray[np.generic] = array[:0] if inputs is None else getattr(inputs, name)
            array[tuple(slice(0, size) for size in values.shape)] = values
            if array.ndim == 2:
                array[: len(values), values.shape[1] :] = 0
            array[len(values) :] = _padding(name, shape, len(values), 0 if inputs is None else inputs.num_tokens)
        end = _num_bytes(shape)
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()

    def tensors(self, shape: StepShape) -> "StepTensors":
        """The inputs of a shape, as views of the device's memory."""
        if shape not in self._tensors:
            self._tensors[shape] = StepTensors(
                **{
                    name: self._device[begin:end].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(sizes)
                    for name, dtype, sizes, begin, end in _layout(shape)
                }
            )
        return self._tensors[shape]

    def _host_arrays(self, shape: StepShape) -> dict[str, NDArray[np.generic]]:
        """The same on the host, in the copy whose turn it is."""
        if shape not in self._arrays:
            self._arrays[shape] = [
                {
                    name: memory[begin:end].view(dtype).reshape(sizes)
                    for name, dtype, sizes, begin, end in _layout(shape)
                }
                for memory in (host.numpy() for host in self._hosts)
            ]
        return self._arrays[shape][self._turn]


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
            is_open=not shape.is_decode,
        )


def _layout(shape: StepShape) -> Iterator[tuple[str, type[np.generic], tuple[int, ...], int, int]]:
    """Name, type and sizes of every input, and the bytes from and to which it lies in memory."""
    arrays: tuple[tuple[str, type[np.generic], tuple[int, ...]], ...] = (
        ("input_ids", np.int64, (shape.num_tokens,)),
        ("position_ids", np.int64, (shape.num_tokens,)),
        ("slot_mapping", np.int64, (shape.num_tokens,)),
        ("logits_indices", np.int64, (shape.num_logits,)),
        ("sampled_positions", np.int64, (shape.num_logits,)),
        ("query_start", np.int32, (shape.num_seqs + 1,)),
        ("context_lens", np.int32, (shape.num_seqs,)),
        ("block_tables", np.int32, (shape.num_seqs, shape.max_blocks)),
    )
    begin = 0
    for name, dtype, sizes in arrays:
        num_bytes = prod(sizes) * np.dtype(dtype).itemsize
        yield name, dtype, sizes, begin, begin + num_bytes
        begin += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@cache
def _num_bytes(shape: StepShape) -> int:
    return max(end for *_, end in _layout(shape))


def _padding(name: str, shape: StepShape, num_values: int, num_tokens: int) -> int | NDArray[np.generic]:
    """What stands behind a step's own values."""
    if name == "slot_mapping":
        return -1
    if name != "query_start":
        return 0
    if shape.is_decode:
        return np.arange(num_values, shape.num_seqs + 1, dtype=np.int32)
    starts = np.full(shape.num_seqs + 1 - num_values, num_tokens, np.int32)
    starts[-1] = shape.num_tokens  # the last sequence has what padding there is, the others behind the step's nothing
    return starts


def _mixed_seqs(num_seqs: int, max_num_seqs: int, row_step: int) -> int:
    number = min(_bucket(num_seqs, _MIN_MIXED_SEQS, _MIXED_SEQS_FACTOR), decode_bucket(max_num_seqs))
    return _multiple(number, row_step)


def _multiple(number: int, step: int) -> int:
    return -(-number // step) * step


def _bucket(number: int, least: int, factor: int) -> int:
    """The first of `least`, `least * factor`, `least * factor**2`, ... that is not less than the number."""
    while least < number:
        least *= factor
    return least
