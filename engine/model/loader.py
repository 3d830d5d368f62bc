"""Loads a model's weights and runs packed forwards through transformers' own definition of it.

Owns the model, its KV cache tensor and the attention context between them. Knows nothing of sequences or scheduling.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from engine.attention.base import AttentionBackend, AttentionContext, slot_width
from engine.attention.select import select_backend
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.checkpoint import Checkpoint, open_checkpoint
from engine.model.devices import Dtypes, describe_arithmetic, resolve_device, resolve_dtypes, use_device
from engine.model.fusion import choose_kit
from engine.model.large_pages import prefer_large_pages
from engine.model.library_linear import ROW_STEP
from engine.model.locate import cache_dir_of, prepare_model_dir
from engine.model.native_decoder import NativeDecoder
from engine.model.native_layer import NativeLayer
from engine.model.output_rows import MIN_ROWS, OutputRows
from engine.model.packed_linear import LinearPacker, choose_packer, int8_packer
from engine.model.preparation import Preparation
from engine.model.prepared_models import PreparedModels
from engine.model.registry import Architecture, find_architecture, max_position
from engine.model.rotary_table import tabulate_rotation
from engine.parallel.rank import ALONE, Rank


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model ready for packed forwards, with its attention context attached."""

    model: nn.Module
    decoder: NativeDecoder | None  # runs the model's steps; None: transformers' own forward does
    last_layer: NativeLayer | None  # in the model, if it can leave out what nobody wants
    output_rows: OutputRows  # in the model
    context: AttentionContext
    device: torch.device
    dtypes: Dtypes
    model_dir: Path  # holds tokenizer.json
    cache_dir: Path  # for whatever else is compiled for this model's device
    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    fingerprint: str  # equal fingerprints, equal arithmetic
    backend_name: str
    is_batch_invariant: bool
    hidden_size: int
    can_generate: bool  # else the checkpoint has no output layer: logits mean nothing
    row_step: int = 1  # a step's rows are best padded to multiples of it

    @property
    def uses_triton(self) -> bool:
        """Whether it runs on Triton's kernels throughout: attention, fused modules and what is done with its logits."""
        return self.context.paged_backend is not None

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        width = slot_width(self.head_dim, self.dtypes.kv_cache)
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * width * self.dtypes.kv_cache.itemsize

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Give the context a cache of `num_blocks` blocks. Raises `ModelLoadError` if the memory is not there."""
        width = slot_width(self.head_dim, self.dtypes.kv_cache)
        shape = (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, width)
        self.context.kv_cache = None
        try:
            # A CPU hands out pages when they are touched, and no backend of its own reads a slot that was not written.
            # Triton's attention reads keys that no row sees, up to the end of a tile.
            allocate = torch.zeros if self.uses_triton else torch.empty
            kv_cache = allocate(shape, dtype=self.dtypes.kv_cache, device=self.device)
        except RuntimeError as error:  # out of memory, on either kind of device
            size = num_blocks * self.kv_block_bytes
            raise ModelLoadError(
                f"{num_blocks} KV blocks need {size / 2**30:.1f} GiB, which {self.device} does not have free; "
                "lower num_kv_blocks or kv_memory_fraction"
            ) from error
        prefer_large_pages(kv_cache)
        self.context.kv_cache = kv_cache

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_indices: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Run one packed step; `context.batch` describes it.

        input_ids, position_ids: int64 `[num_tokens]`; logits_indices: int64 `[num_logits]`, the tokens whose logits are
        wanted. Returns `[num_logits, vocab_size]`, written to `out` if given: float32, but the model's dtype where all
        runs on Triton's kernels, which widen what they read. Mutates the KV cache.
        """
        if self.decoder is not None:
            with torch.inference_mode():
                computed = self.decoder.logits(self.decoder.hidden_states(input_ids, position_ids, logits_indices))
                return computed if out is None else out.copy_(computed)
        num_logits = logits_indices.shape[0]
        wanted = _at_least_two(logits_indices)
        last_layer = self.last_layer if len(wanted) < len(input_ids) else None
        self.output_rows.target = out
        with torch.inference_mode(), nullcontext() if last_layer is None else last_layer.wanting(wanted):
            output = self.model(
                input_ids=_at_least_two(input_ids)[None],
                position_ids=_at_least_two(position_ids)[None],
                use_cache=False,
                logits_to_keep=wanted if last_layer is None else 0,  # all that the layer returns
            )
            logits: Tensor = output.logits[0, :num_logits]
        if out is None:
            return logits if self.uses_triton else logits.float()
        return out if logits.data_ptr() == out.data_ptr() else out.copy_(logits)

    def forward_pooled(
        self, input_ids: Tensor, position_ids: Tensor, logits_indices: Tensor, hidden_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the final hidden states of some tokens beside, as the output layer would be given them.

        hidden_indices: int64 `[num_hidden]`. Returns logits and float32 `[num_hidden, hidden_size]`.
        """
        num_logits = logits_indices.shape[0]
        wanted = torch.cat((logits_indices, hidden_indices))
        if self.decoder is not None:
            with torch.inference_mode():
                hidden_states = self.decoder.hidden_states(input_ids, position_ids, wanted)
                logits = self.decoder.logits(hidden_states[:num_logits])
                return logits, hidden_states[num_logits:].to(torch.float32, copy=True)
        self.output_rows.num_logits = num_logits
        try:
            logits = self.forward(input_ids, position_ids, wanted)
        finally:
            self.output_rows.num_logits = None
        hidden_states = self.output_rows.take_hidden_states()[: hidden_indices.shape[0]]
        return logits[:num_logits], hidden_states.to(torch.float32, copy=True)


def load_model(config: EngineConfig, rank: Rank = ALONE) -> LoadedModel:
    """Load `config.model_path` onto its device. Raises `ModelLoadError` with what is wrong and the remedy.

    A rank of several loads its part, whose sums are then to be added up (`engine.parallel.row_parallel`).

    `config.num_threads` is set for the whole process; the KV cache is allocated later, by `allocate_kv_cache`.
    """
    cache_dir = cache_dir_of(config)
    kernels_dir = cache_dir / "kernels"
    device = _take_device(config, rank)
    checkpoint = open_checkpoint(prepare_model_dir(config.model_path, cache_dir))
    architecture = find_architecture(checkpoint.config, source=config.model_path)
    dtypes = resolve_dtypes(config, device, architecture, checkpoint.dtype_name)
    backend = _select_backend(config, device, dtypes, cache_dir)
    context = AttentionContext(backend)
    uses_triton = context.paged_backend is not None
    kit = choose_kit(uses_triton, device, dtypes.activations, kernels_dir)
    packer = _choose_packer(config, uses_triton, device, dtypes.activations, kernels_dir)
    preparation = Preparation(checkpoint, architecture, device, dtypes, context, kit, packer, rank)
    prepared = preparation.run(PreparedModels(cache_dir / "prepared"))
    model, shape = prepared.model, prepared.shape
    longest = _max_model_len(model.config, config.max_model_len)
    if uses_triton:
        tabulate_rotation(model, longest, device, dtypes.activations)
    return LoadedModel(
        model=model,
        # Between ranks' layers sums are added up, which is no native call.
        decoder=NativeDecoder.of(model, context) if prepared.fused.is_plain and rank.size == 1 else None,
        last_layer=_native_last_layer(model),
        output_rows=OutputRows.put_into(model),
        context=context,
        device=device,
        dtypes=dtypes,
        model_dir=checkpoint.folder,
        cache_dir=cache_dir,
        max_model_len=longest,
        vocab_size=prepared.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=config.block_size,
        fingerprint=_fingerprint(checkpoint, device, dtypes, backend.build, packer, prepared.fused.name, rank),
        backend_name=backend.name,
        is_batch_invariant=_is_batch_invariant(config, architecture, backend, packer, device, dtypes.activations),
        hidden_size=model.config.hidden_size,
        can_generate=prepared.has_output_layer,
        row_step=ROW_STEP if uses_triton and config.deterministic else 1,
    )


def _select_backend(config: EngineConfig, device: torch.device, dtypes: Dtypes, cache_dir: Path) -> AttentionBackend:
    return select_backend(
        config.attention,
        device=device,
        dtype=dtypes.activations,
        kv_dtype=dtypes.kv_cache,
        cache_dir=cache_dir,
        deterministic=config.deterministic,
    )


def _native_last_layer(model: Any) -> NativeLayer | None:
    layers = getattr(model.get_decoder(), "layers", None)
    return layers[-1] if layers is not None and isinstance(layers[-1], NativeLayer) else None


def _take_device(config: EngineConfig, rank: Rank) -> torch.device:
    """The device that is asked for, as this process's own, with its threads. Raises `ModelLoadError`."""
    device = resolve_device(config.device, rank)
    use_device(device)
    for name, without in (("quantize", "none"), ("kv_cache_dtype", "auto")):
        value = getattr(config, name)
        if value != without and device.type != "cpu":
            raise ModelLoadError(f"{name} {value} is for a CPU, not for {device}; set {name} to {without}")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif rank.size > 1:  # on one machine
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.size))
    return device


def _choose_packer(
    config: EngineConfig, uses_triton: bool, device: torch.device, dtype: torch.dtype, kernels_dir: Path
) -> LinearPacker | None:
    """What linear layers are exchanged for; None: for nothing."""
    if config.quantize == "int8":
        return int8_packer(dtype, kernels_dir)
    if not uses_triton:
        return choose_packer(dtype, kernels_dir) if device.type == "cpu" else None
    if not config.deterministic:
        return None
    from engine.model.triton_linear import invariant_packer

    return invariant_packer(dtype, device)


def _is_batch_invariant(
    config: EngineConfig,
    architecture: Architecture,
    backend: AttentionBackend,
    packer: LinearPacker | None,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Raises `ModelLoadError` where it was asked for and is not."""
    is_invariant = packer is not None and backend.is_row_invariant and not architecture.has_experts
    if config.deterministic and not is_invariant:
        reason = (
            "a mixture of experts multiplies through a library that chooses its order of additions by the rows"
            if architecture.has_experts
            else f"attention {backend.name!r} or the linear layers in {dtype} do not keep it on {device}"
        )
        raise ModelLoadError(f"deterministic cannot be kept: {reason}; set it to false")
    return is_invariant


def _max_model_len(model_config: Any, asked: int | None) -> int:
    limit = max_position(model_config)
    if asked is not None and asked > limit:
        raise ModelLoadError(f"max_model_len {asked} passes the model's {limit} positions; set it to {limit} or less")
    return asked or limit


def _fingerprint(
    checkpoint: Checkpoint,
    device: torch.device,
    dtypes: Dtypes,
    attention_build: str,
    packer: LinearPacker | None,
    fused: str,
    rank: Rank,
) -> str:
    """Names the arithmetic: weights, dtypes, attention, instruction set or GPU, and the libraries' builds."""
    parts = [
        checkpoint.fingerprint(),
        str(dtypes),
        attention_build,
        "linear" if packer is None else packer.build,
        fused,
        describe_arithmetic(device),
        f"transformers {transformers.__version__}",
        *([] if rank.size == 1 else [f"sums of {rank.size} ranks"]),
    ]
    return blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def _at_least_two(rows: Tensor) -> Tensor:
    """Repeat a single row, so that it is computed as it would be among others."""
    return rows if rows.shape[0] >= MIN_ROWS else rows.expand(MIN_ROWS)
