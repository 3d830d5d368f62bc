"""From a checkpoint to a model as it runs: weights read, attention attached, modules fused, linear layers packed.

On a CPU the outcome is kept (`engine.model.prepared_models`), and the next start with the same of everything takes it
from there. Whether fused modules and packed layers compute what they must is then known from the first time.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from engine.attention.base import AttentionContext
from engine.errors import ModelLoadError
from engine.model.attention_hook import ATTENTION_NAME, AttentionShape, attach_attention
from engine.model.checkpoint import Checkpoint
from engine.model.devices import Dtypes, describe_arithmetic
from engine.model.fusion import Fused, FusionKit, fuse_model
from engine.model.light_transformers import light_loading
from engine.model.narrow_weights import narrow_embeddings, round_weights
from engine.model.packed_linear import LinearPacker, pack_linears
from engine.model.prepared_models import PreparedModels
from engine.model.registry import Architecture
from engine.parallel.rank import ALONE, Rank
from engine.parallel.sharding import ShardPlan, drop_output_layer, read_shard, shard_config

_SOURCES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to run but for its cache."""

    model: Any
    shape: AttentionShape
    vocab_size: int
    fused: Fused
    has_output_layer: bool  # else logits mean nothing: a checkpoint that only embeds


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a model is prepared from, and for."""

    checkpoint: Checkpoint
    architecture: Architecture
    device: torch.device
    dtypes: Dtypes
    context: AttentionContext
    kit: FusionKit | None
    packer: LinearPacker | None
    rank: Rank = ALONE

    def run(self, kept: PreparedModels) -> Prepared:
        """The model, from what is kept or anew. Raises `ModelLoadError`."""
        if self.device.type != "cpu" or self.context.paged_backend is not None:
            return self._prepare()
        name, shared = self._name(), self._shared()
        prepared = kept.load(name, shared)
        if not isinstance(prepared, Prepared):
            prepared = self._prepare()
            kept.keep(name, prepared, shared)
        return prepared

    def _prepare(self) -> Prepared:
        dtype = self.dtypes.activations
        model, has_output_layer = _load_weights(self.architecture, self.checkpoint, dtype, self.rank)
        if self.dtypes.weights != dtype:
            round_weights(model, self.dtypes.weights)
        model.to(self.device)
        shape = attach_attention(model, self.context, num_layers=model.config.num_hidden_layers)
        vocabulary = model.get_output_embeddings() if has_output_layer else model.get_input_embeddings()
        vocab_size = vocabulary.weight.shape[0]
        fused = Fused() if self.kit is None else fuse_model(model, self.kit, self.device, dtype)
        if self.packer is not None:
            pack_linears(model, self.packer)
            if self.device.type == "cpu":
                narrow_embeddings(model)
        return Prepared(model, shape, vocab_size, fused, has_output_layer)

    def _shared(self) -> dict[str, object]:
        """What a prepared model holds of the process that it runs in."""
        shared: dict[str, object] = {"context": self.context}
        if self.kit is not None:
            shared["rows"] = self.kit.rows
        if self.packer is not None and self.packer.kernel is not None:
            shared["product"] = self.packer.kernel
        return shared

    def _name(self) -> str:
        """Other weights, libraries, kernels, instructions or code of ours: another name."""
        files = [path.stat() for path in self.checkpoint.weight_files]  # fingerprints are made of samples
        parts = [
            self.checkpoint.fingerprint(),
            *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in files),
            f"{self.dtypes.weights} {self.dtypes.activations}",
            "" if self.kit is None else self.kit.rows.build,
            "" if self.packer is None else self.packer.build,
            str(self.rank),
            describe_arithmetic(self.device),
            transformers.__version__,
            _build(),
        ]
        return blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


@cache
def _build() -> str:
    """Names our code that models are made of, and made by."""
    digest = blake2b(digest_size=12)
    folders = (_SOURCES, _SOURCES.parent / "attention", _SOURCES.parent / "parallel")
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _load_weights(
    architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype, rank: Rank
) -> tuple[Any, bool]:
    """The transformers model, a rank's part of it, in eval mode on the CPU, every weight from the checkpoint; and
    whether that has the output layer, which those of models that only embed lack."""
    transformers_logging.disable_progress_bar()
    model_class = getattr(importlib.import_module(architecture.module_name), architecture.class_name)
    source = {"pretrained_model_name_or_path": str(checkpoint.folder), "local_files_only": True}
    if rank.size > 1:
        source = _shard(model_class.config_class.from_pretrained(**source), checkpoint, rank)
    try:
        with light_loading():
            model, info = model_class.from_pretrained(
                **source,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers makes of a folder that it cannot load
        raise ModelLoadError(
            f"{checkpoint.folder} cannot be loaded as {architecture.class_name} "
            f"({type(error).__name__}: {error}); compare config.json with the weights, or fetch the model again"
        ) from error
    missing = sorted(info["missing_keys"])
    has_output_layer = not missing or missing != _output_weights(model)
    if missing and has_output_layer:
        raise ModelLoadError(
            f"{checkpoint.folder} lacks {len(missing)} weights of {architecture.class_name}, {missing[0]} among them; "
            "fetch the model again"
        )
    if not (rank.is_leader and has_output_layer):
        drop_output_layer(model)
    return model.eval(), has_output_layer


def _output_weights(model: Any) -> list[str]:
    """Their names, sorted."""
    layer = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is layer]
    return sorted(f"{name}.{weight}" for weight, _ in layer.named_parameters())


def _shard(config: Any, checkpoint: Checkpoint, rank: Rank) -> dict[str, Any]:
    """What a rank's part of a model is loaded from."""
    plan = ShardPlan(config)
    return {
        "pretrained_model_name_or_path": None,
        "config": shard_config(config, rank),
        "state_dict": read_shard(checkpoint.weight_files, plan, rank),
    }
