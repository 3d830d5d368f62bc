"""What replaces a decoder's modules on a GPU: one kernel from merged rows to pages, one for an addition and a norm.

A layer is then nine kernels, ten where a decode's keys are split: q k v, rotation and writing, attention, output,
addition with norm, gate and up, activation, down, addition with the norm of the layer behind it. Only the first has a
norm before, and the last an addition alone. Whether a module computes what its original does is not decided here:
`engine.model.fusion` tries it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engine.attention.base import PageSlots
from engine.model.fused_modules import FusedAttention, FusedNorm
from engine.model.norm_rule import NormRule
from engine.model.triton_rows import HeadNorms, TritonRows


class PagedAttentionModule(FusedAttention):
    """Norms, rotation and the writing of keys and values in one kernel, then attention over the pages."""

    def __init__(self, rows: TritonRows, *args: Any) -> None:
        """See `FusedAttention`."""
        super().__init__(*args)
        self._rows = rows
        self._head_norms = _head_norms(self._q_norm, self._k_norm, self._head_dim)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: `[1, T, hidden_size]`."""
        attention, q_size = self.attention, self._q_size
        assert attention is not None, "fusion gives every module its attention"
        qkv: Tensor = self.qkv(hidden_states[0])  # [T, q_size + 2 * kv_size]
        if self._head_norms is None and self._q_norm is not None and self._k_norm is not None:
            self._q_norm.in_place(qkv[:, :q_size])
            self._k_norm.in_place(qkv[:, q_size : q_size + self._kv_size])
        angles = None
        if self.rotates:
            assert position_embeddings is not None, "a rotating layer is given its angles"
            angles = position_embeddings[0][0], position_embeddings[1][0]
        pages = attention.pages()
        slots = pages or PageSlots.beside(qkv, self._kv_size // self._head_dim, self._head_dim)
        q = self._rows.rotate_and_write(qkv, angles, self._head_norms, slots, num_heads=q_size // self._head_dim)
        if pages is None:
            output = attention.attend_rows(q, slots.keys, slots.values, self._rules)
        else:
            output = attention.attend_written(q, self._rules)
        return self.o_proj(output.view(1, len(qkv), q_size)), None


@dataclass(slots=True, eq=False)
class _FirstNorm:
    """A layer's first norm, which the layer before computes together with its output: from hand to hand, once."""

    weight: Tensor
    rule: NormRule
    _output: Tensor | None = None
    _normed: Tensor | None = None

    def give(self, output: Tensor, normed: Tensor) -> Tensor:
        """The layer's output; both `[num_rows, size]`, the output returned as `[1, num_rows, size]`."""
        self._output, self._normed = output[None], normed[None]
        return self._output

    def take(self, hidden_states: Tensor) -> Tensor | None:
        """The norm of what a layer is given, if that very tensor was the output of the one before."""
        normed = self._normed if hidden_states is self._output else None
        self._output = self._normed = None
        return normed


class PagedLayer(nn.Module):
    """Norm, attention, addition and norm in one, MLP, addition: the layer that most decoders have."""

    def __init__(self, rows: TritonRows, original: nn.Module) -> None:
        """original: with fused parts by transformers' names. Raises `AttributeError` otherwise."""
        super().__init__()
        self._rows = rows
        self.input_layernorm: nn.Module = original.input_layernorm  # type: ignore[assignment]
        self.self_attn: nn.Module = original.self_attn  # type: ignore[assignment]
        self.mlp: nn.Module = original.mlp  # type: ignore[assignment]
        norm = original.post_attention_layernorm
        if not isinstance(norm, FusedNorm) or not isinstance(self.self_attn, PagedAttentionModule):
            raise AttributeError("the layer's norm or attention is not fused")
        self._weight = norm.weight
        self._rule = norm.rule
        first = self.input_layernorm
        self.first_norm = _FirstNorm(first.weight, first.rule) if isinstance(first, FusedNorm) else None
        self.next_norm: _FirstNorm | None = None  # the first of the layer behind this one

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states: `[1, T, hidden_size]`."""
        normed = None if self.first_norm is None else self.first_norm.take(hidden_states)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states) if normed is None else normed, **kwargs)
        total, rows = self._rows.add_norm(attended[0], hidden_states[0], self._weight, self._rule)
        output: Tensor = self.mlp(rows[None])
        following = self.next_norm
        if following is None or not output.is_contiguous():
            return total[None] + output
        return following.give(*self._rows.add_norm(output[0], total, following.weight, following.rule))


def link_layers(layer: nn.Module, following: nn.Module) -> None:
    """Have a layer compute the first norm of the one behind it, where both are of this kind."""
    if isinstance(layer, PagedLayer) and isinstance(following, PagedLayer):
        layer.next_norm = following.first_norm


def _head_norms(q_norm: FusedNorm | None, k_norm: FusedNorm | None, head_dim: int) -> HeadNorms | None:
    """None where there are none, or where they norm something else than heads."""
    if q_norm is None or k_norm is None or q_norm.rule != k_norm.rule:
        return None
    if q_norm.weight.shape != (head_dim,) or k_norm.weight.shape != (head_dim,):
        return None
    return HeadNorms(q_norm.weight, k_norm.weight, q_norm.rule)
