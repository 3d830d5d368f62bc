"""Routes a transformers model's attention to the engine: the registered function, and the proof that it is called.

Every attention module carries an `AttentionLayer` as a plain attribute; the function that transformers calls finds its
cache and step there. Nothing is global, so that two models live in one process.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from engine.attention.base import AttentionBatch, AttentionContext, AttentionRules, PageSlots
from engine.errors import ModelLoadError
from engine.kernels.threads import one_thread

ATTENTION_NAME = "promptmill"
_ATTRIBUTE = "promptmill_attention"
_NO_STEP = "the runner sets the step before each forward"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all attention layers of a model share, as seen in its own calls."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class RowAttention(Protocol):
    """Attention as a model's modules call it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        """Returns `[1, T, num_heads, head_dim]` for query `[1, num_heads, T, head_dim]`, and key and value likewise."""
        ...

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> Tensor:
        """Returns `[T, num_heads, head_dim]` for q of that shape, and k and v likewise, any strides but the last."""
        ...

    def pages(self) -> PageSlots | None:
        """Where the step's keys and values may be written, for `attend_written`; None: that is not to be had."""
        ...

    def attend_written(self, q: Tensor, rules: AttentionRules) -> Tensor:
        """`attend_rows` after the keys and values were written to `pages`."""
        ...

    def links(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rules: AttentionRules, band: int | None = None
    ) -> list[bytes] | None:
        """The native call that does `attend_rows` into out, in any step once it is entered; None: not to be had.

        Of padding it leaves out as it is. Of a band of the step two calls: one writes its keys and values.
        """
        ...

    def enter(self) -> None:
        """Have what `links` gave work on the step in hand."""
        ...


class AttentionLayer:
    """One attention module's place in the engine.

    T may pass the batch's `num_tokens`: the rows behind are padding, and attend to nothing.
    """

    def __init__(self, context: AttentionContext, index: int) -> None:
        self._context = context
        self._index = index

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        """See `RowAttention.attend`."""
        return self.attend_rows(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), rules)[None]

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> Tensor:
        """See `RowAttention.attend_rows`."""
        pages, batch = self._step()
        num_rows, num_tokens = q.shape[0], batch.num_tokens
        if num_tokens < num_rows:
            q, k, v = q[:num_tokens], k[:num_tokens], v[:num_tokens]
        return _padded(self._context.backend.forward(q, k, v, pages, batch, rules), num_rows)

    def pages(self) -> PageSlots | None:
        """See `RowAttention.pages`."""
        if self._context.paged_backend is None:
            return None
        pages, batch = self._step()
        return PageSlots(pages[0], pages[1], batch.slot_mapping)

    def attend_written(self, q: Tensor, rules: AttentionRules) -> Tensor:
        """See `RowAttention.attend_written`."""
        backend = self._context.paged_backend
        assert backend is not None, "pages are given by a backend that attends to them"
        pages, batch = self._step()
        return _padded(backend.attend(q[: batch.num_tokens], pages, batch, rules), len(q))

    def links(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rules: AttentionRules, band: int | None = None
    ) -> list[bytes] | None:
        """See `RowAttention.links`."""
        backend = self._context.chained_backend
        return None if backend is None else backend.links(q, k, v, out, self._index, rules, band)

    def enter(self) -> None:
        """See `RowAttention.enter`."""
        context = self._context
        assert context.chained_backend is not None, "links are given by a backend that has them"
        assert context.batch is not None and context.kv_cache is not None, _NO_STEP
        context.chained_backend.enter(context.batch, context.kv_cache)

    def _step(self) -> tuple[Tensor, AttentionBatch]:
        """The layer's pages and the step in hand."""
        context = self._context
        assert context.batch is not None and context.kv_cache is not None, _NO_STEP
        return context.kv_cache[self._index], context.batch


def _padded(output: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros behind `[num_tokens, num_heads, head_dim]`."""
    missing = num_rows - output.shape[0]
    return nn.functional.pad(output, (0, 0, 0, 0, 0, missing)) if missing else output


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' models call under the name `promptmill`."""
    layer: RowAttention = getattr(module, _ATTRIBUTE)
    rules = AttentionRules(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    output = layer.attend(query, key, value, rules)
    return output, None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


def attach_attention(model: nn.Module, context: AttentionContext, *, num_layers: int) -> AttentionShape:
    """Give every attention module its layer, in the order in which a forward calls them.

    Raises `ModelLoadError` if some layer does not call the registered function, or if layers differ in shape.
    """
    probes = {module: _Probe() for module in model.modules()}
    calls: list[_Probe] = []
    for module, probe in probes.items():
        probe.calls = calls
        setattr(module, _ATTRIBUTE, probe)
    device = next(model.parameters()).device
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    with torch.inference_mode(), one_thread():
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    index_of = {probe: index for index, probe in enumerate(calls)}
    for module, called in probes.items():
        delattr(module, _ATTRIBUTE)
        if called in index_of:
            setattr(module, _ATTRIBUTE, AttentionLayer(context, index_of[called]))
    return _check(calls, num_layers)


def attention_of(module: nn.Module) -> RowAttention | None:
    """The module's place in the engine, if it attends."""
    return getattr(module, _ATTRIBUTE, None)


@contextmanager
def attention_set_to(stand_ins: Mapping[nn.Module, RowAttention]) -> Iterator[None]:
    """Have these modules attend through their stand-ins for a while."""
    layers = {module: getattr(module, _ATTRIBUTE) for module in stand_ins}
    try:
        for module, stand_in in stand_ins.items():
            setattr(module, _ATTRIBUTE, stand_in)
        yield
    finally:
        for module, layer in layers.items():
            setattr(module, _ATTRIBUTE, layer)


class _Probe:
    """Stands in for a layer during one forward, and notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[_Probe] = []
        self.shapes: tuple[torch.Size, torch.Size] = (torch.Size(), torch.Size())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        self.calls.append(self)
        self.shapes = (key.shape, value.shape)
        return torch.zeros_like(query).transpose(1, 2)


def _check(calls: list[_Probe], num_layers: int) -> AttentionShape:
    if len(set(calls)) != num_layers or len(calls) != num_layers:
        raise ModelLoadError(
            f"only {len(set(calls))} of the model's {num_layers} layers attend through transformers' attention "
            "interface; such a model is not supported"
        )
    shapes = {shape for probe in calls for shape in probe.shapes}
    if len(shapes) != 1:
        raise ModelLoadError(f"the model's layers differ in their keys' or values' shape ({shapes}): not supported")
    _, num_kv_heads, _, head_dim = shapes.pop()
    return AttentionShape(num_layers, num_kv_heads, head_dim)
