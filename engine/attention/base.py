"""What every attention backend gets and gives: one packed step of queries over a paged KV cache.

Owns the values that carry a step's state from the runner to the attention function. Knows nothing of models, of
scheduling, or of how any backend computes.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SCALE_BYTES = 4  # a float32 behind the codes of each key and of each value of a kv head


def slot_width(head_dim: int, kv_dtype: torch.dtype) -> int:
    """Elements of a cache that a key takes, or a value: in int8 its scale has room among them."""
    return head_dim + (SCALE_BYTES if kv_dtype == torch.int8 else 0)


@dataclass(slots=True)
class AttentionBatch:
    """One step. The tokens of all sequences lie packed one after the other; tensors are on the model's device."""

    query_start: Tensor  # int32 [num_seqs + 1], cumulative query lengths of the packed tokens
    context_lens: Tensor  # int32 [num_seqs], keys visible to the sequence's last query token: computed + this step's
    block_tables: Tensor  # int32 [num_seqs, max_blocks]
    slot_mapping: Tensor  # int64 [num_tokens], block * block_size + offset where each token's k and v are written
    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_context_len: int
    num_decodes: int = 0  # leading sequences that are known to have one query token each
    is_open: bool = False  # of a CUDA graph: how many tokens each sequence has is known on the device alone


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """What an attention layer asks of its scores, the same in every step."""

    scaling: float  # of q · k
    sliding_window: int | None = None  # a key is seen by a query at most one less than so many positions after it
    softcap: float | None = None  # scores are bounded by `softcap * tanh(score / softcap)`
    sinks: Tensor | None = None  # [num_heads], join each row's softmax without a value


class AttentionBackend(Protocol):
    """Writes a step's keys and values into the pages, then attends over the pages.

    A row's result (one query token, one head) is a function of that query and of its keys and values in order of
    position: never of its batch-mates, of how its prompt was cut into chunks, or of the number of threads. A backend
    that is not `is_row_invariant` keeps that but for the last bits, which may differ between a prefill and a decode.
    """

    name: str
    is_row_invariant: bool
    build: str  # names what the bits of a result depend on besides the inputs: equal builds, equal arithmetic

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """Return `[num_tokens, num_heads, head_dim]`, contiguous, in q's dtype. Mutates `kv_cache_layer`.

        q: `[num_tokens, num_heads, head_dim]`; k, v: `[num_tokens, num_kv_heads, head_dim]`, any strides.
        kv_cache_layer: `[2, num_blocks, block_size, num_kv_heads, slot_width]`, in q's dtype or in a shorter one; how a
        block's elements lie in their memory is the backend's own affair, since it alone reads what it wrote. In int8 a
        key, or a value, of a kv head is rounded to whole numbers up to 127 times a scale of its own.
        """
        ...


@runtime_checkable
class PagedBackend(AttentionBackend, Protocol):
    """A backend that also attends to pages into which another kernel wrote the step's keys and values."""

    def attend(self, q: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules) -> Tensor:
        """`forward` without the writing."""
        ...

    def kernels_of(self, batch: AttentionBatch, kv_cache_layer: Tensor) -> Hashable:
        """Equal for steps that run the same compiled kernels. Of the batch only what lies on the host is looked at."""
        ...


@runtime_checkable
class ChainedBackend(AttentionBackend, Protocol):
    """A backend whose calls may be parts of a chain of native calls."""

    def links(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        layer: int,
        rules: AttentionRules,
        band: int | None = None,
    ) -> list[bytes] | None:
        """The call that does `forward`, into out, for the step that was entered last; None: not by these rules.

        Of a band two calls: one that writes its keys and values, and one that attends.

        Tensors as `forward` has them, or with more rows, which it neither reads nor writes.
        """
        ...

    def enter(self, batch: AttentionBatch, kv_cache: Tensor) -> None:
        """What the calls are to work on. kv_cache: of all layers. Cheap if it is what was entered last."""
        ...

    def enter_bands(self, bands: Sequence[AttentionBatch], kv_cache: Tensor) -> None:
        """What the calls for bands are to work on, the first ones; their tensors are held until the next step."""
        ...


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Where a step's keys and values go: slots int64 `[num_tokens]`, negative for padding, in these pages."""

    keys: Tensor  # [..., num_kv_heads, head_dim], all slots one after the other
    values: Tensor
    slots: Tensor

    @classmethod
    def beside(cls, rows: Tensor, num_kv_heads: int, head_dim: int) -> "PageSlots":
        """Fresh slots, one for each of the rows."""
        keys, values = rows.new_empty((2, len(rows), num_kv_heads, head_dim)).unbind(0)
        return cls(keys, values, torch.arange(len(rows), device=rows.device))


class AttentionContext:
    """The engine's object on every attention module of one model: its cache, its backend and the step in hand.

    The runner sets `batch` before each forward; nothing here is shared between two models.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self.paged_backend = backend if isinstance(backend, PagedBackend) else None
        self.chained_backend = backend if isinstance(backend, ChainedBackend) else None
        self.kv_cache: Tensor | None = None  # [num_layers, 2, num_blocks, block_size, num_kv_heads, slot_width]
        self.batch: AttentionBatch | None = None
