"""What replaces a decoder's modules on a GPU: one kernel from merged rows to pages, one for an addition and a norm.

A layer is then ten kernels, eleven where a decode's keys are split: norm, q k v, rotation and writing, attention,
output, addition with norm, gate and up, activation, down, addition. Whether a module computes what its original does
is not known here: `engine.model.fusion` tries it.
"""

from typing import Any

from torch import Tensor, nn

from engine.attention.base import PageSlots
from engine.model.fused_modules import FusedAttention, FusedNorm
from engine.model.triton_rows import HeadNorms, NormRule, TritonRows


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
        return self.o(output.view(1, len(qkv), q_size)), None


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
        self._rule = _rule(norm)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states: `[1, T, hidden_size]`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        total, normed = self._rows.add_norm(attended[0], hidden_states[0], self._weight, self._rule)
        output: Tensor = total[None] + self.mlp(normed[None])
        return output


def _head_norms(q_norm: FusedNorm | None, k_norm: FusedNorm | None, head_dim: int) -> HeadNorms | None:
    """None where there are none, or where they norm something else than heads."""
    if q_norm is None or k_norm is None or _rule(q_norm) != _rule(k_norm):
        return None
    if q_norm.weight.shape != (head_dim,) or k_norm.weight.shape != (head_dim,):
        return None
    return HeadNorms(q_norm.weight, k_norm.weight, _rule(q_norm))


def _rule(norm: FusedNorm) -> NormRule:
    return NormRule(norm.epsilon, norm.adds_one, norm.rounds_first)
