"""A whole decoder layer over plain rows on a CPU: two chains of native calls with attention between them.

A step of few rows would else spend as long between the products as within them, on the way through Python. Whether a
layer computes what its original does is not known here: `engine.model.fusion` tries it.
"""

import torch
from torch import Tensor, nn

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
        """hidden_states: `[1, T, hidden_size]`."""
        x, attention, mlp = hidden_states[0].contiguous(), self.self_attn, self.mlp
        products: tuple[nn.Module, ...] = (attention.qkv, attention.o, mlp.gate_up, mlp.down)
        chained = [product for product in products if isinstance(product, ChainedLinear)]
        if len(chained) == len(products):
            return self._in_chains(x, position_embeddings, *chained)[None]
        x = attention.of_rows(self.input_layernorm.of_rows(x), position_embeddings).add_(x)
        return mlp.of_rows(self.post_attention_layernorm.of_rows(x)).add_(x)[None]

    def _in_chains(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        qkv_product: ChainedLinear,
        o: ChainedLinear,
        gate_up_product: ChainedLinear,
        down: ChainedLinear,
    ) -> Tensor:
        """The same to the bit: additions are the last thing that a product does to its rows."""
        rows, attention = self._rows, self.self_attn
        normed, out = torch.empty_like(x), torch.empty_like(x)
        qkv = x.new_empty((len(x), qkv_product.out_features))
        rows.chain(
            self.input_layernorm.link(rows, x, normed),
            qkv_product.link(normed, qkv),
            *attention.head_links(qkv, position_embeddings),
        )
        attended = attention.attend(qkv)  # has a name, as all of them: a chain holds addresses, not tensors
        gate_up = x.new_empty((len(x), gate_up_product.out_features))
        active = x.new_empty((len(x), down.in_features))
        rows.chain(
            o.link(attended, out, x),
            self.post_attention_layernorm.link(rows, out, normed),
            gate_up_product.link(normed, gate_up),
            rows.glu_link(gate_up, active, is_gelu=self.mlp.is_gelu),
            down.link(active, out, out),
        )
        return out
