"""A whole decoder layer over plain rows on a CPU: one chain of native calls.

A step of few rows would else spend as long between the products as within them, on the way through Python; for the same
reason the calls are put together once for each number of rows, over tensors that stay where they are. Where attention
is no native call it stands between two chains. Whether a layer computes what its original does is not known here:
`engine.model.fusion` tries it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.kernels.native_function import PreparedChain
from engine.model.attention_hook import RowAttention
from engine.model.fused_modules import FusedMLP, FusedNorm, NativeAttentionModule
from engine.model.native_rows import NativeRows
from engine.model.packed_linear import ChainedLinear


class NativeLayer(nn.Module):
    """Norm, attention, addition, norm, MLP, addition: the layer that most decoders have."""

    def __init__(self, rows: NativeRows, original: nn.Module) -> None:
        """original: with fused parts by transformers' names. Raises `AttributeError` otherwise."""
        super().__init__()
        self._rows = rows
        norm, attention = original.input_layernorm, original.self_attn
        next_norm, mlp = original.post_attention_layernorm, original.mlp
        if not (
            isinstance(norm, FusedNorm)
            and isinstance(attention, NativeAttentionModule)
            and isinstance(next_norm, FusedNorm)
            and isinstance(mlp, FusedMLP)
        ):
            raise AttributeError("the layer's norms, attention or MLP are not fused")
        self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp = norm, attention, next_norm, mlp

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: object
    ) -> Tensor:
        """hidden_states: `[1, T, hidden_size]`. In chains, what it returns is overwritten by the model's next step."""
        chains = self._chains(hidden_states, position_embeddings)
        if chains is None:
            return self._by_modules(hidden_states[0], position_embeddings)[None]
        return self._in_chains(hidden_states, chains)

    def _by_modules(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x.contiguous()
        x = self.self_attn.of_rows(self.input_layernorm.of_rows(x), position_embeddings).add_(x)
        return self.mlp.of_rows(self.post_attention_layernorm.of_rows(x)).add_(x)

    def _in_chains(self, hidden_states: Tensor, chains: "_Chains") -> Tensor:
        """The same to the bit: additions are the last thing that a product does to its rows."""
        hidden = chains.hidden
        if hidden_states.data_ptr() != hidden.data_ptr():  # the first layer's, or behind one that is not in chains
            hidden.copy_(hidden_states)
        if chains.whole is not None:
            self._attention.enter()
            chains.whole()
            return hidden
        chains.to_attention()
        attended = self.self_attn.attend(*chains.heads)  # has a name: a chain holds addresses, not tensors
        chains.from_attention.start_from(attended.data_ptr())
        chains.from_attention()
        return hidden

    @property
    def _attention(self) -> RowAttention:
        assert self.self_attn.attention is not None, "fusion gives every module its attention"
        return self.self_attn.attention

    def _chains(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> "_Chains | None":
        """As prepared for so many rows; None where a product cannot be a part of a chain."""
        num_rows, dtype, workspace = hidden_states.shape[1], hidden_states.dtype, self._rows.workspace
        workspace.reserve(num_rows)
        angles = None if position_embeddings is None else workspace.take_angles(position_embeddings)
        key = self, self._attention, num_rows, dtype, torch.get_num_threads()
        if key not in workspace.prepared:
            attention, mlp = self.self_attn, self.mlp
            products: tuple[nn.Module, ...] = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)
            chained = [product for product in products if isinstance(product, ChainedLinear)]
            is_chained = len(chained) == len(products)
            workspace.prepared[key] = self._prepare(num_rows, dtype, angles, *chained) if is_chained else None
        chains: _Chains | None = workspace.prepared[key]
        return chains

    def _prepare(
        self,
        num_rows: int,
        dtype: torch.dtype,
        angles: tuple[Tensor, Tensor] | None,
        qkv_product: ChainedLinear,
        o: ChainedLinear,
        gate_up_product: ChainedLinear,
        down: ChainedLinear,
    ) -> "_Chains":
        rows, attention = self._rows, self.self_attn

        def place(name: str, size: int) -> Tensor:
            return rows.workspace.rows(name, num_rows, size, dtype)

        hidden, normed = place("hidden", down.out_features), place("normed", down.out_features)
        qkv, attended = place("qkv", qkv_product.out_features), place("attended", o.in_features)
        gate_up, active = place("gate_up", gate_up_product.out_features), place("active", down.in_features)
        heads = attention.heads(qkv)
        before = (
            self.input_layernorm.link(rows, hidden, normed),
            qkv_product.link(normed, qkv),
            *attention.head_links(qkv, angles),
        )
        behind = (
            o.link(attended, hidden, hidden),
            self.post_attention_layernorm.link(rows, hidden, normed),
            gate_up_product.link(normed, gate_up),
            rows.glu_link(gate_up, active, is_gelu=self.mlp.is_gelu),
            down.link(active, hidden, hidden),
        )
        between = attention.attention_link(*heads, attended)
        return _Chains(
            hidden=hidden[None],
            heads=heads,
            whole=None if between is None else rows.chain.prepare(*before, between, *behind),
            to_attention=rows.chain.prepare(*before),
            from_attention=rows.chain.prepare(*behind),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Chains:
    """A layer's calls for a number of rows, and the tensors that they read and write."""

    hidden: Tensor  # [1, T, hidden_size]: what comes in and what goes out
    heads: tuple[Tensor, Tensor, Tensor]  # of q, k and v
    whole: PreparedChain | None  # None: attention is no native call, and stands between the two
    to_attention: PreparedChain
    from_attention: PreparedChain
