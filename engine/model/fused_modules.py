"""What replaces a decoder's modules: merged products, and one pass where transformers has many.

Owns the forward of each, by the names that transformers' decoders share; what is not merged keeps its name. Whether one
computes what its original does is not decided here: `engine.model.fusion` tries it.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.attention.base import AttentionRules
from engine.model.attention_hook import RowAttention
from engine.model.native_rows import NativeRows
from engine.model.norm_rule import NormRule
from engine.model.packed_linear import plain_weight
from engine.model.quantised_rows import QuantisedRows


class RowKernels(Protocol):
    """The passes over rows that every device has."""

    @property
    def build(self) -> str:
        """Names their arithmetic: equal builds, equal bits."""
        ...

    def norm(self, x: Tensor, out: Tensor, weight: Tensor, rule: NormRule) -> None:
        """RMS norm of every `len(weight)` elements of x's rows into out, which may be x; both `[num_rows, size]`."""
        ...

    def glu(self, gate_up: Tensor, *, is_gelu: bool) -> Tensor:
        """`activation(gate) * up` `[num_rows, size]` for gate_up `[num_rows, 2 * size]`: SiLU, or GELU with tanh."""
        ...


class FusedNorm(nn.Module):
    """An RMS norm in one pass."""

    def __init__(self, rows: RowKernels, norm: nn.Module, *, adds_one: bool, rounds_first: bool) -> None:
        """norm: has a `weight` and its epsilon. Raises `AttributeError` otherwise."""
        super().__init__()
        self._rows = rows
        self.weight: Tensor = norm.weight.detach()  # type: ignore[operator]
        epsilon = getattr(norm, "variance_epsilon", None)
        epsilon = float(norm.eps if epsilon is None else epsilon)  # type: ignore[arg-type]
        self.rule = NormRule(epsilon, adds_one, rounds_first)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., size]`."""
        return self.of_rows(x.contiguous().view(-1, x.shape[-1])).view(x.shape)

    def of_rows(self, x: Tensor) -> Tensor:
        """x: `[num_rows, size]`, elements of a row side by side."""
        out = torch.empty_like(x)
        self._into(x, out)
        return out

    def in_place(self, x: Tensor) -> None:
        """Norm each group of `size` in the rows of x `[num_rows, num_groups * size]`."""
        self._into(x, x)

    def link(self, rows: NativeRows, x: Tensor, out: Tensor | QuantisedRows) -> bytes:
        """The call that norms each group of `size` in the rows of x into out, which may be x."""
        return rows.norm_link(x, out, self.weight, self.rule)

    def _into(self, x: Tensor, out: Tensor) -> None:
        self._rows.norm(x, out, self.weight, self.rule)


class FusedAttention(nn.Module):
    """Merged q, k and v, and the output product. What lies between them is the device's."""

    def __init__(
        self,
        original: nn.Module,
        rules: AttentionRules,
        norms: tuple[FusedNorm | None, FusedNorm | None],
        head_dim: int,
    ) -> None:
        """original: with q_proj, k_proj and v_proj, or qkv_proj, and o_proj. Raises `AttributeError` otherwise."""
        super().__init__()
        self._rules = rules
        self._head_dim = head_dim
        self._q_norm, self._k_norm = norms
        self.qkv = merge(original, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        self.o_proj = merge(original, ("o_proj",), "o_proj")
        self._q_size = self.o_proj.in_features
        self._kv_size = (self.qkv.out_features - self._q_size) // 2
        self.attention: RowAttention | None = None
        self.rotates = True


class NativeAttentionModule(FusedAttention):
    """Norms and rotation in place, then attention over views of the merged rows."""

    def __init__(self, rows: NativeRows, *args: Any) -> None:
        """See `FusedAttention`."""
        super().__init__(*args)
        self._rows = rows

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: `[1, T, hidden_size]`."""
        return self.of_rows(hidden_states[0], position_embeddings)[None], None

    def of_rows(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: `[T, hidden_size]`; a new tensor of its shape."""
        output: Tensor = self.o_proj.forward(self.attended(x, position_embeddings))
        return output

    def attended(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the output product is made of, `[T, q_size]`, for x `[T, hidden_size]`."""
        qkv = self.qkv.forward(x)
        self._rows.chain(len(qkv), *self.head_links(qkv, position_embeddings))
        return self.attend(*self.heads(qkv))

    def head_links(self, qkv: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> list[bytes]:
        """The calls between the product and attention, in place; qkv: `[T, q_size + 2 * kv_size]`."""
        q_size, k_end = self._q_size, self._q_size + self._kv_size
        links = []
        if self._q_norm is not None and self._k_norm is not None:
            links.append(self._q_norm.link(self._rows, q := qkv[:, :q_size], q))
            links.append(self._k_norm.link(self._rows, k := qkv[:, q_size:k_end], k))
        if self.rotates:
            assert position_embeddings is not None, "a rotating layer is given its angles"
            cos, sin = position_embeddings
            links.append(self._rows.rope_link(qkv[:, :k_end], cos[0], sin[0], head_dim=self._head_dim))
        return links

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of its rows of q, k and v, each `[T, num_heads, head_dim]`."""
        num_rows, k_end, head_dim = len(qkv), self._q_size + self._kv_size, self._head_dim
        return (
            qkv[:, : self._q_size].view(num_rows, -1, head_dim),
            qkv[:, self._q_size : k_end].view(num_rows, -1, head_dim),
            qkv[:, k_end:].view(num_rows, -1, head_dim),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns `[T, q_size]`, contiguous, for the heads of q, k and v that the output product's are made of."""
        assert self.attention is not None, "fusion gives every module its attention"
        return self.attention.attend_rows(q, k, v, self._rules).view(len(q), self._q_size)

    def attention_links(
        self, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, band: int | None = None
    ) -> list[bytes] | None:
        """`attend` into attended, in any step that its attention has entered; None: that is not to be had.

        Of a band of the step two calls: one writes its keys and values.
        """
        assert self.attention is not None, "fusion gives every module its attention"
        return self.attention.links(q, k, v, attended.view(q.shape), self._rules, band)


class FusedMLP(nn.Module):
    """Merged gate and up, one pass of activation and product, then down."""

    def __init__(self, rows: RowKernels, original: nn.Module, *, is_gelu: bool) -> None:
        """original: with gate_proj and up_proj, or gate_up_proj, and down_proj. Raises `AttributeError` otherwise."""
        super().__init__()
        self._rows = rows
        self.is_gelu = is_gelu
        self.gate_up = merge(original, ("gate_proj", "up_proj"), "gate_up_proj")
        self.down_proj = merge(original, ("down_proj",), "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x: `[1, T, hidden_size]`."""
        return self.of_rows(x[0])[None]

    def of_rows(self, x: Tensor) -> Tensor:
        """x: `[T, hidden_size]`; a new tensor of its shape."""
        return self.down_proj.forward(self._rows.glu(self.gate_up.forward(x), is_gelu=self.is_gelu))


def merge(original: nn.Module, names: Iterable[str], merged_name: str) -> nn.Linear:
    """One layer of the parts, or of what the original has merged already."""
    if hasattr(original, merged_name):
        names = (merged_name,)
    plain = [plain_weight(getattr(original, name)) for name in names]
    weights = [part[0] for part in plain if part is not None]
    biases = [part[1] for part in plain if part is not None]
    if len(weights) < len(plain):
        raise AttributeError(f"{merged_name} is made of something else than linear layers")
    bias = None
    if any(part is not None for part in biases):
        zeros = [weight.new_zeros(len(weight)) for weight in weights]
        bias = torch.cat([zero if part is None else part for part, zero in zip(biases, zeros, strict=True)])
    weight = torch.cat(weights)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
