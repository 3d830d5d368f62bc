"""A whole decoder on a CPU, from token ids to logits: embeddings, layers and norm in two chains of native calls.

What transformers' forward does around the layers, in Python, is up to a fifth of a decode of one sequence. Whether a
model is a plain row of layers is seen at load (`is_plain`); one that is anything else keeps transformers' forward.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.attention.base import AttentionContext
from engine.kernels.cpu_features import last_cache_bytes
from engine.kernels.threads import one_thread
from engine.model.bands import MIN_ROWS, MIN_ROWS_FROM_MEMORY, Bands, cut_bands, moved
from engine.model.chained_linear import ChainedLinear
from engine.model.fused_modules import FusedNorm
from engine.model.narrow_weights import NarrowEmbedding
from engine.model.native_layer import NativeLayer
from engine.model.registry import max_position

_NUM_TOKENS = 7
_ANGLES_AT_ONCE = 512  # positions: 0.3 to 0.7 ms, where 131,072 are 0.15 to 0.4 s
_MAX_KEPT_LOGITS = 1 << 24  # 64 MiB: more, as of a scored prompt, are made anew for each step
_PLACES = struct.Struct("@3P")  # of token ids, positions and wanted rows
_ADDRESS_BYTES = struct.calcsize("@P")


def is_plain(model: Any) -> bool:
    """Whether a forward does nothing but what `NativeDecoder` does; its layers' attention must work for a few tokens.

    A forward shows it: each of the modules is given what the one before it gave, and the logits are the last one's.
    """
    parts = _Parts.of(model)
    if parts is None:
        return False
    given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    gave: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given[module], gave[module] = (args, kwargs), output

    modules = [parts.embeddings, *parts.layers, parts.norm, parts.output]
    modules += [] if parts.rotary is None else [parts.rotary]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    tokens = torch.arange(_NUM_TOKENS)[None]
    try:
        logits = model(input_ids=tokens * 3 + 1, position_ids=tokens * 2, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(gave) != len(modules):
        return False
    angles = None if parts.rotary is None else gave[parts.rotary]
    return (
        _same(gave[parts.embeddings], _embeddings_of(parts.embeddings)[tokens * 3 + 1])
        and all(_same(given[layer][1].get("position_embeddings"), angles) for layer in parts.layers)
        and (parts.rotary is None or _same(angles, parts.rotary(gave[parts.embeddings], position_ids=tokens * 2)))
        and all(_same(given[to][0][0], gave[by]) for by, to in parts.line())
        and _same(logits, gave[parts.output])
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A decoder's modules, by the names that transformers' models share."""

    embeddings: nn.Module
    rotary: nn.Module | None  # of positions to cos and sin
    layers: list[NativeLayer]
    norm: FusedNorm
    output: nn.Module

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """None where one of them is something else."""
        decoder, embeddings, output = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
        norm, layers = getattr(decoder, "norm", None), list(getattr(decoder, "layers", []))
        if not layers or not all(isinstance(layer, NativeLayer) for layer in layers) or not isinstance(norm, FusedNorm):
            return None
        if output is None or not isinstance(embeddings, nn.Embedding | NarrowEmbedding):
            return None
        return cls(embeddings, getattr(decoder, "rotary_emb", None), layers, norm, output)

    def line(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each that gives, with the one that is given it."""
        modules = [self.embeddings, *self.layers, self.norm, self.output]
        return list(pairwise(modules))


class NativeDecoder:
    """Runs a plain model's steps. A row's bits depend on no other."""

    def __init__(self, parts: _Parts, output: ChainedLinear, context: AttentionContext, max_positions: int) -> None:
        self._parts = parts
        self._output = output
        self._context = context
        self._max_positions = max_positions
        self._rows = parts.layers[0].rows
        self._dtype = parts.norm.weight.dtype
        self._places = ctypes.create_string_buffer(_PLACES.size)
        layer_bytes = parts.layers[0].num_bytes
        self._min_rows_of_band = MIN_ROWS if layer_bytes <= last_cache_bytes() else MIN_ROWS_FROM_MEMORY
        self._places_of_bands: list[ctypes.Array[ctypes.c_char]] = []
        self._angles: list[Tensor] = []  # cos and sin, `[max_positions, rotary_dim]` each
        self._num_angles = 0  # positions that have theirs; the system gives no memory to the others
        self._logits = torch.empty((0, output.out_features))

    @classmethod
    def of(cls, model: Any, context: AttentionContext) -> Self | None:
        """For a model that `is_plain`; None where some part of it, packed as it is now, is no native call."""
        parts = _Parts.of(model)
        if parts is None or not isinstance(parts.output, ChainedLinear):
            return None
        is_native = all(layer.is_native() for layer in parts.layers)
        return cls(parts, parts.output, context, max_position(model.config)) if is_native else None

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor) -> Tensor:
        """What the output layer is given, of the step in the attention's context. Mutates the KV cache.

        input_ids, position_ids: int64 `[num_tokens]`; wanted: int64 `[num_wanted]`, of these tokens. Returns
        `[num_wanted, hidden_size]`, which the next step overwrites.
        """
        batch, kv_cache, backend = self._context.batch, self._context.kv_cache, self._context.chained_backend
        assert batch is not None and kv_cache is not None and backend is not None, "the runner sets the step"
        num_rows, num_wanted, workspace = len(input_ids), len(wanted), self._rows.workspace
        num_threads = torch.get_num_threads()
        workspace.reserve(max(num_rows, num_wanted), spare_rows=num_threads + 1)
        self._reach(batch.max_context_len)
        given = [places.contiguous() for places in (input_ids, position_ids, wanted)]  # held until all has run
        _PLACES.pack_into(self._places, 0, *(places.data_ptr() for places in given))
        key = self, num_threads
        if key not in workspace.prepared:
            prepare, segments = self._rows.chain.prepare, self._segments(self._places, workspace.num_rows)
            workspace.prepared[key] = prepare(*chain.from_iterable(segments)), prepare(*self._links_behind())
        first, behind = workspace.prepared[key]
        bands = cut_bands(batch, num_threads, self._min_rows_of_band)
        if bands is not None:
            room = workspace.num_rows // len(bands.parts)
            self._run_bands(bands, room, given)
            given.append(moved(wanted, bands, room))
            _PLACES.pack_into(self._places, 0, 0, 0, given[-1].data_ptr())
        else:
            backend.enter(batch, kv_cache)
            first(num_rows)
        behind(num_wanted)
        return self._normed(num_wanted)

    def _run_bands(self, bands: Bands, room: int, places: Sequence[Tensor]) -> None:
        """What the first chain does, for each band in so many rows of room."""
        context, prepared, count = self._context, self._rows.workspace.prepared, len(bands.parts)
        assert context.kv_cache is not None and context.chained_backend is not None
        context.chained_backend.enter_bands([band.batch for band in bands.parts], context.kv_cache)
        while len(self._places_of_bands) < count:
            self._places_of_bands.append(ctypes.create_string_buffer(_PLACES.size))
        for buffer, band in zip(self._places_of_bands, bands.parts, strict=False):
            _PLACES.pack_into(buffer, 0, *(part.data_ptr() + band.first * part.itemsize for part in places[:2]), 0)
        key = self, "bands", count
        if key not in prepared:
            with one_thread():
                prepared[key] = self._rows.chain.prepare_bands(
                    [list(map(b"".join, self._segments(self._places_of_bands[i], room, i))) for i in range(count)]
                )
        prepared[key]([band.num_rows for band in bands.parts], in_order=bands.in_order)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """float32 `[num_rows, vocab_size]` of what `hidden_states` gave, which the next step overwrites."""
        num_rows, vocab_size = len(hidden_states), self._output.out_features
        if num_rows * vocab_size > _MAX_KEPT_LOGITS:
            return self._output.forward(hidden_states).float()
        if num_rows > len(self._logits):  # new memory in each step would be cleared by the system first
            self._logits = torch.empty((1 << (num_rows - 1).bit_length(), vocab_size))
        logits = self._logits[:num_rows]
        self._rows.chain(num_rows, self._output.link(hidden_states, logits))
        return logits

    def _segments(
        self, places: "ctypes.Array[ctypes.c_char]", num_rows: int, band: int | None = None
    ) -> list[list[bytes]]:
        """The calls up to the last layer's attention, of rows that are named in `places`.

        In segments: what a band's read of the band before it, keys and values, that one's segments before have written.
        """
        last, first = self._parts.layers[-1], 0 if band is None else band * num_rows
        hidden, qkv, attended = last.places(num_rows, self._dtype, first)
        angles = self._rows_of_angles(num_rows, first)
        links = [self._gather(_embeddings_of(self._parts.embeddings), places, 0, hidden)]
        for table, rows in zip(self._angles, angles or (), strict=True):
            links.append(self._gather(table, places, 1, rows[0]))
        segments: list[list[bytes]] = []
        for layer in self._parts.layers:
            heads = layer.self_attn.heads(qkv)
            attention = layer.self_attn.attention_links(*heads, attended, band)
            assert attention is not None, "such layers are native throughout"
            segments.append([*links, *layer.links_before(hidden, qkv, angles, first), *attention[:-1]])
            segments.append([attention[-1]])
            if layer is not last:
                segments[-1] += layer.links_behind(hidden, attended, first)
            links = []
        return segments

    def _links_behind(self) -> list[bytes]:
        """The calls behind that, for the rows that are wanted."""
        workspace, last = self._rows.workspace, self._parts.layers[-1]
        num_rows = workspace.num_rows
        hidden, _, attended = last.places(num_rows, self._dtype)
        own, given = (
            workspace.rows(f"wanted {name}", num_rows, rows.shape[1], self._dtype)
            for name, rows in (("hidden", hidden), ("attended", attended))
        )
        return [
            self._gather(hidden, self._places, 2, own),
            self._gather(attended, self._places, 2, given),
            *last.links_behind(own, given),
            self._parts.norm.link(self._rows, own, self._normed(num_rows)),
        ]

    def _normed(self, num_rows: int) -> Tensor:
        return self._rows.workspace.rows("normed", num_rows, self._output.in_features, self._dtype)

    def _gather(self, table: Tensor, places: "ctypes.Array[ctypes.c_char]", which: int, out: Tensor) -> bytes:
        """The call that takes rows of a table by token ids (0), positions (1) or wanted rows (2)."""
        return self._rows.gather_link(table, ctypes.addressof(places) + which * _ADDRESS_BYTES, out)

    def _rows_of_angles(self, num_rows: int, first: int = 0) -> tuple[Tensor, Tensor] | None:
        """cos and sin `[1, num_rows, rotary_dim]` of a step."""
        if not self._angles:
            return None
        size = self._angles[0].shape[1]
        cos, sin = (
            self._rows.workspace.rows(name, num_rows, size, self._dtype, first)[None] for name in ("cos", "sin")
        )
        return cos, sin

    def _reach(self, num_positions: int) -> None:
        """Have the angles of so many positions, as the model computes them: up to its largest they are one's own."""
        rotary, begin = self._parts.rotary, self._num_angles
        if rotary is None or begin >= num_positions:
            return
        end = min(-(-num_positions // _ANGLES_AT_ONCE) * _ANGLES_AT_ONCE, self._max_positions)
        angles = rotary(torch.empty(0, dtype=self._dtype), position_ids=torch.arange(begin, end)[None])
        if not self._angles:
            self._angles = [part.new_empty((self._max_positions, part.shape[-1])) for part in angles]
        for table, part in zip(self._angles, angles, strict=True):
            table[begin:end] = part[0]
        self._num_angles = end


def _embeddings_of(module: nn.Module) -> Tensor:
    """The table `[num_embeddings, hidden_size]`."""
    table: Tensor = module.table if isinstance(module, NarrowEmbedding) else module.weight  # type: ignore[assignment]
    return table.detach()
