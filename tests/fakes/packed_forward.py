"""Packed forwards of a loaded model without an engine: sequences cut into steps, laid out over shuffled blocks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.attention.base import AttentionBatch

if TYPE_CHECKING:
    from engine.model.loader import LoadedModel

BLOCK_SIZE = 16  # of panels: kernels have a slower way for others
LENGTHS = [1, 5, 33, 50]  # past every tiny model's sliding window
_CPU = torch.device("cpu")
Part = tuple[int, int, int]  # sequence, first token, last token + 1


def prompts(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


def run(model: "LoadedModel", sequences: list[Tensor], steps: list[list[Part]], *, every: int = 1) -> list[Tensor]:
    """Logits `[length, vocab_size]` of every token of every sequence, computed in the given steps.

    every: of each step's tokens only the first and each so many behind it have logits; the others are nan.
    """
    counts = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split(counts)
    model.allocate_kv_cache(sum(counts))
    device = model.device
    logits = [torch.full((len(tokens), model.vocab_size), float("nan")) for tokens in sequences]
    for parts in steps:
        model.context.batch = batch_of(parts, order, device)
        tokens = torch.cat([sequences[i][first:last] for i, first, last in parts])
        positions = torch.cat([torch.arange(first, last) for _, first, last in parts])
        wanted = torch.arange(0, len(tokens), every, device=device)
        output = torch.full((len(tokens), model.vocab_size), float("nan"))
        output[::every] = model.forward(tokens.to(device), positions.to(device), wanted).cpu()
        for (i, first, last), rows in zip(parts, output.split([p[2] - p[1] for p in parts]), strict=True):
            logits[i][first:last] = rows
    return logits


def batch_of(
    parts: list[Part], blocks: Sequence[Tensor], device: torch.device = _CPU, *, block_size: int = BLOCK_SIZE
) -> AttentionBatch:
    """One step of these parts. blocks: of each sequence, in order."""
    lengths = [last - first for _, first, last in parts]
    positions = [torch.arange(first, last) for _, first, last in parts]
    slots = [
        blocks[i][p // block_size] * block_size + p % block_size for (i, _, _), p in zip(parts, positions, strict=True)
    ]
    tables = torch.nn.utils.rnn.pad_sequence([blocks[i] for i, _, _ in parts], batch_first=True)
    return AttentionBatch(
        query_start=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        context_lens=torch.tensor([last for _, _, last in parts], dtype=torch.int32, device=device),
        block_tables=tables.to(device, torch.int32),
        slot_mapping=torch.cat(slots).to(device),
        num_seqs=len(parts),
        num_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_context_len=max(last for _, _, last in parts),
    )


def steps_of(size: int) -> list[list[Part]]:
    return [
        [(i, first, min(first + size, length)) for i, length in enumerate(LENGTHS) if first < length]
        for first in range(0, max(LENGTHS), size)
    ]


def decodes() -> list[list[Part]]:
    """Steps of one token a sequence where a sequence or a block ends, and of several in between."""
    ends = (*LENGTHS, *range(0, max(LENGTHS), BLOCK_SIZE))
    bounds = sorted({at for end in ends for at in (end - 1, end, end + 1) if 0 <= at <= max(LENGTHS)})
    return [
        [(i, first, min(last, length)) for i, length in enumerate(LENGTHS) if first < length]
        for first, last in pairwise(bounds)
    ]
