"""Which kernels a GPU's steps of each shape run, without a GPU: launchers run on CPU tensors, and launch nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from engine.attention.base import AttentionRules
from engine.attention.triton_backend import TritonAttention
from engine.runner.step_shapes import StepBuffers, StepShape, every_table, largest_shapes
from tests.fakes.triton_compiler import Launch

BLOCK_SIZE = 16
# num_heads, num_kv_heads, head_dim, dtype, max_num_seqs, max_model_len
MODELS = [
    (16, 8, 128, torch.bfloat16, 256, 40_960),
    (9, 3, 64, torch.bfloat16, 512, 8192),
    (8, 1, 256, torch.bfloat16, 64, 2000),
    (16, 16, 64, torch.float32, 8, 1024),
]


@contextmanager
def launches() -> Iterator[set[tuple[Any, ...]]]:
    """What is launched meanwhile; equal for launches of the same machine code."""
    launched: set[tuple[Any, ...]] = set()
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.add(Launch.of(self, args, kwargs).key())

    JITFunction.run = note
    try:
        yield launched
    finally:
        JITFunction.run = run


def main() -> None:
    """A line for each model: how many kernels its attention has, and how many where it is deterministic. An error if
    steps that are said to run the same ones do not."""
    for model in MODELS:
        print(*(len(attention_kernels(*model, deterministic=deterministic)) for deterministic in (False, True)))


def attention_kernels(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_model_len: int,
    *,
    deterministic: bool,
) -> set[tuple[Any, ...]]:
    """Of steps of all shapes; 128 tokens stand for any number of them, and so do 384."""
    max_blocks = -(-max_model_len // BLOCK_SIZE)
    buffers = StepBuffers(largest_shapes(max_num_seqs, 384, max_blocks), torch.device("cpu"))
    layer = torch.empty((2, 4, BLOCK_SIZE, num_kv_heads, head_dim), dtype=dtype)
    attention, rules = TritonAttention(deterministic=deterministic), AttentionRules(0.1)
    found: dict[Any, set[tuple[Any, ...]]] = {}
    for shape in every_table(max_num_seqs, max_blocks):
        for same in (shape, *([] if shape.is_decode else [StepShape.mixed(384, shape.num_logits, shape.max_blocks)])):
            batch = buffers.tensors(same).batch(same, BLOCK_SIZE)
            q = torch.empty((same.num_tokens, num_heads, head_dim), dtype=dtype)
            with launches() as launched:
                attention.attend(q, layer, batch, rules)
            said = found.setdefault(attention.kernels_of(batch, layer), launched)
            assert said == launched, f"{same} runs other kernels than {said}"
    return set().union(*found.values())


if __name__ == "__main__":
    main()
