"""Paged attention inputs for tests: sequences cut into chunks, laid out over shuffled blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionRules, slot_width
from tests.fakes.packed_forward import BLOCK_SIZE, Part, batch_of


@dataclass(slots=True)
class PagedSequence:
    """The whole queries, keys and values of one sequence, and the blocks it lies in."""

    q: Tensor  # [num_tokens, num_heads, head_dim]
    k: Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor
    blocks: list[int]


@dataclass(slots=True, kw_only=True)
class PagedWorld:
    """A cache full of garbage, with sequences that lie in it."""

    kv_cache: Tensor  # [2, num_blocks, block_size, num_kv_heads, slot_width]
    sequences: list[PagedSequence]

    @classmethod
    def build(
        cls,
        lengths: list[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = BLOCK_SIZE,
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> "PagedWorld":
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        # Blocks that nobody wrote hold nan: a backend that reads past a sequence's end shows it. In int8 scales do.
        kv_dtype = kv_dtype or dtype
        shape = (2, len(order), block_size, num_kv_heads, slot_width(head_dim, kv_dtype))
        kv_cache = torch.full(shape, -1 if kv_dtype == torch.int8 else float("nan"), dtype=kv_dtype)
        sequences = []
        for length, count in zip(lengths, counts, strict=True):
            q = torch.randn(length, num_heads, head_dim, generator=generator) * 2
            k = torch.randn(length, num_kv_heads, head_dim, generator=generator)
            v = torch.randn(length, num_kv_heads, head_dim, generator=generator)
            blocks = [order.pop() for _ in range(count)]
            sequences.append(PagedSequence(q.to(dtype), k.to(dtype), v.to(dtype), blocks))
        return cls(kv_cache=kv_cache, sequences=sequences)

    def whole(self) -> list[list[Part]]:
        """One step that prefills every sequence."""
        return [[(i, 0, len(sequence.q)) for i, sequence in enumerate(self.sequences)]]

    def alone(self) -> list[list[Part]]:
        """A step for each sequence."""
        return [[part] for part in self.whole()[0]]

    def decoded(self) -> list[list[Part]]:
        """All tokens but the last in one step, then a decode of each sequence."""
        parts = self.whole()[0]
        first = [(i, 0, length - 1) for i, _, length in parts if length > 1]
        return [first, [(i, length - 1, length) for i, _, length in parts]]

    def step(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
        """Packed q, k, v and batch of one step."""
        blocks = [torch.tensor(sequence.blocks) for sequence in self.sequences]
        batch = batch_of(parts, blocks, block_size=self.kv_cache.shape[2])
        q, k, v = (
            torch.cat([getattr(self.sequences[index], name)[first:last] for index, first, last in parts])
            for name in ("q", "k", "v")
        )
        return q, k, v, batch

    def run(
        self, backend: AttentionBackend, steps: list[list[Part]], rules: AttentionRules | None = None
    ) -> list[Tensor]:
        """Run the steps over a fresh copy of the cache; one `[length, num_heads, head_dim]` for each sequence."""
        cache = self.kv_cache.clone()
        rules = rules or AttentionRules(self.sequences[0].q.shape[-1] ** -0.5)
        outputs = [torch.full_like(sequence.q, float("nan")) for sequence in self.sequences]
        for parts in steps:
            q, k, v, batch = self.step(parts)
            output = backend.forward(q, k, v, cache, batch, rules)
            offset = 0
            for index, first, last in parts:
                outputs[index][first:last] = output[offset : offset + last - first]
                offset += last - first
        return outputs


def dense_attention(sequence: PagedSequence, rules: AttentionRules) -> Tensor:
    """Attention by its definition, in float64, without pages. Returns `[num_tokens, num_heads, head_dim]`."""
    q, k, v = (x.double().transpose(0, 1) for x in (sequence.q, sequence.k, sequence.v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * rules.scaling
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = distance < 0
    if rules.sliding_window is not None:
        hidden |= distance >= rules.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if rules.sinks is not None:
        weights = weights[..., :-1]
    return (weights @ v).transpose(0, 1)
