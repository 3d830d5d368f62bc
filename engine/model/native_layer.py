"""A whole decoder layer over plain rows on a CPU: one chain of native calls.

A step of few rows would else spend as long between the products as within them, on the way through Python; for the same
reason the calls are put together once, over tensors that stay where they are. Where attention
is no native call it stands between two chains. Whether a layer computes what its original does is not decided here:
`engine.model.fusion` tries it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.kernels.native_function import PreparedChain
from engine.model.attention_hook import RowAttention
from engine.model.chained_linear import ChainedLinear
from engine.model.fused_modules import FusedMLP, FusedNorm, NativeAttentionModule
from engine.model.native_rows import NativeRows


class NativeLayer(nn.Module):
    """Norm, attention, addition, norm, MLP, addition: the layer that most decoders have."""

    def __init__(self, rows: NativeRows, original: nn.Module) -> None:
        """original: with fused parts by transformers' names. Raises `AttributeError` otherwise."""
        super().__init__()
        self.rows = rows
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
        self._wanted: Tensor | None = None  # int64 [num_wanted]: rows that are computed behind attention; None: all

    @contextmanager
    def wanting(self, rows: Tensor) -> Iterator[None]:
        """For a while `forward` returns these rows alone, int64 `[num_wanted]`, no more than it is given."""
        self._wanted = rows
        try:
            yield
        finally:
            self._wanted = None

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
        attended = self.self_attn.attended(self.input_layernorm.of_rows(x), position_embeddings)
        if self._wanted is not None:
            attended, x = attended[self._wanted], x[self._wanted]
        x = self.self_attn.o_proj.forward(attended).add_(x)
        return self.mlp.of_rows(self.post_attention_layernorm.of_rows(x)).add_(x)

    def _in_chains(self, hidden_states: Tensor, chains: "_Chains") -> Tensor:
        """The same to the bit: additions are the last thing that a product does to its rows."""
        num_rows = hidden_states.shape[1]
        hidden = chains.hidden[:, :num_rows]
        if hidden_states.data_ptr() != hidden.data_ptr():  # the first layer's, or behind one that is not in chains
            hidden.copy_(hidden_states)
        if chains.attended is not None:
            self._attention.enter()
        if chains.whole is not None and self._wanted is None:
            chains.whole(num_rows)
            return hidden
        chains.first(num_rows)
        if chains.attended is None:
            attended = self.self_attn.attend(*(heads[:num_rows] for heads in chains.heads))
        else:
            attended = chains.attended[:num_rows]
        if self._wanted is not None:
            return self._wanted_rows(self._wanted, hidden[0], attended)[None]
        chains.behind.start_from(attended.data_ptr())  # held until it has run: a chain has addresses, not tensors
        chains.behind(num_rows)
        return hidden

    @property
    def _attention(self) -> RowAttention:
        assert self.self_attn.attention is not None, "fusion gives every module its attention"
        return self.self_attn.attention

    def _products(self) -> "_Products | None":
        """None where one cannot be a part of a chain."""
        attention, mlp = self.self_attn, self.mlp
        products: tuple[nn.Module, ...] = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)
        chained = [product for product in products if isinstance(product, ChainedLinear)]
        return _Products(*chained) if len(chained) == len(products) else None

    def _chains(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> "_Chains | None":
        """Over as many rows as there is room for; None where a product cannot be a part of a chain."""
        dtype, workspace = hidden_states.dtype, self.rows.workspace
        workspace.reserve(hidden_states.shape[1])
        angles = None if position_embeddings is None else workspace.take_angles(position_embeddings)
        key = self, self._attention, dtype, torch.get_num_threads()
        if key not in workspace.prepared:
            workspace.prepared[key] = None if self._products() is None else self._prepare(dtype, angles)
        chains: _Chains | None = workspace.prepared[key]
        return chains

    def is_native(self) -> bool:
        """Whether all of it is native calls, attention included."""
        products, dtype = self._products(), self.input_layernorm.weight.dtype
        if products is None:
            return False
        qkv, attended = (
            torch.empty((1, size), dtype=dtype) for size in (products.qkv.out_features, products.o.in_features)
        )
        return self.self_attn.attention_links(*self.self_attn.heads(qkv), attended) is not None

    @property
    def num_bytes(self) -> int:
        """Of its products' weights; it must be native."""
        products = self._products()
        assert products is not None, "a native layer is made of such products"
        return sum(product.num_bytes for product in products)

    def links_before(
        self, hidden: Tensor, qkv: Tensor, angles: tuple[Tensor, Tensor] | None, first: int = 0
    ) -> list[bytes]:
        """The calls before attention, from hidden rows to qkv; first: of the rows between that are theirs."""
        products, workspace = self._products(), self.rows.workspace
        assert products is not None, "a layer in chains is made of such products"
        normed = products.qkv.input_rows(workspace, "normed", len(hidden), hidden.dtype, first)
        return [
            self.input_layernorm.link(self.rows, hidden, normed),
            products.qkv.link(normed, qkv),
            *self.self_attn.head_links(qkv, angles),
        ]

    def links_behind(self, hidden: Tensor, attended: Tensor, first: int = 0) -> list[bytes]:
        """The calls behind attention, of hidden rows as they came to the layer; first: as above."""
        products, workspace, num_rows, dtype = self._products(), self.rows.workspace, len(hidden), hidden.dtype
        assert products is not None, "a layer in chains is made of such products"
        normed = products.gate_up.input_rows(workspace, "normed", num_rows, dtype, first)
        gate_up = workspace.rows("gate_up", num_rows, products.gate_up.out_features, dtype, first)
        active = products.down.input_rows(workspace, "active", num_rows, dtype, first)
        return [
            products.o.link(attended, hidden, hidden),
            self.post_attention_layernorm.link(self.rows, hidden, normed),
            products.gate_up.link(normed, gate_up),
            self.rows.glu_link(gate_up, active, is_gelu=self.mlp.is_gelu),
            products.down.link(active, hidden, hidden),
        ]

    def places(self, num_rows: int, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Where its calls find and leave rows: hidden, qkv and attended."""
        products, rows = self._products(), self.rows.workspace.rows
        assert products is not None, "a layer in chains is made of such products"
        return (
            rows("hidden", num_rows, products.down.out_features, dtype, first),
            rows("qkv", num_rows, products.qkv.out_features, dtype, first),
            rows("attended", num_rows, products.o.in_features, dtype, first),
        )

    def _prepare(self, dtype: torch.dtype, angles: tuple[Tensor, Tensor] | None) -> "_Chains":
        rows = self.rows
        hidden, qkv, attended = self.places(rows.workspace.num_rows, dtype)
        heads = self.self_attn.heads(qkv)
        first, behind = self.links_before(hidden, qkv, angles), self.links_behind(hidden, attended)
        between = self.self_attn.attention_links(*heads, attended)
        if between is not None:
            first += between
        return _Chains(
            hidden=hidden[None],
            heads=heads,
            attended=None if between is None else attended,
            whole=None if between is None else rows.chain.prepare(*first, *behind),
            first=rows.chain.prepare(*first),
            behind=rows.chain.prepare(*behind),
        )

    def _wanted_rows(self, wanted: Tensor, hidden: Tensor, attended: Tensor) -> Tensor:
        """What is behind attention, for these of the rows `[num_rows, ...]`."""
        workspace, num_wanted = self.rows.workspace, len(wanted)
        own = workspace.rows("wanted hidden", num_wanted, hidden.shape[1], hidden.dtype)
        given = workspace.rows("wanted attended", num_wanted, attended.shape[1], attended.dtype)
        key = self, "wanted", hidden.dtype, torch.get_num_threads()
        if key not in workspace.prepared:
            workspace.prepared[key] = self.rows.chain.prepare(*self.links_behind(own, given))
        torch.index_select(hidden, 0, wanted, out=own)
        torch.index_select(attended, 0, wanted, out=given)
        workspace.prepared[key](num_wanted)
        return own


class _Products(NamedTuple):
    qkv: ChainedLinear
    o: ChainedLinear
    gate_up: ChainedLinear
    down: ChainedLinear


@dataclass(frozen=True, slots=True, eq=False)
class _Chains:
    """A layer's calls, and the tensors that they read and write, of as many rows as there is room for."""

    hidden: Tensor  # [1, num_rows, hidden_size]: what comes in and what goes out
    heads: tuple[Tensor, Tensor, Tensor]  # of q, k and v
    attended: Tensor | None  # [num_rows, q_size]; None: attention is no native call, and stands between the two
    whole: PreparedChain | None  # both, where attention is a native call
    first: PreparedChain  # up to attention, that included where it is a native call
    behind: PreparedChain
