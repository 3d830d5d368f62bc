"""A rank's part of a model: a smaller model of the same class, whose weights are slices of the checkpoint's.

How each layer is cut is said by transformers, in the plan that comes with an architecture: `colwise` layers by their
outputs, `rowwise` ones by their inputs (`engine.parallel.row_parallel` adds up what they give), the rest not at all. A
weight is read slice by slice, so that no process ever holds the whole of a layer that is cut. Knows nothing of devices
or of processes.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.errors import ModelLoadError
from engine.parallel.rank import SHARED_OUT, Rank, check_even

_COLWISE, _ROWWISE = "colwise", "rowwise"
_KINDS = {_COLWISE, _ROWWISE, "replicated_with_grad_allreduce"}  # the last: of norms, whole on every rank


class ShardPlan:
    """How transformers would cut the layers of a model."""

    def __init__(self, config: Any) -> None:
        """config: the transformers config object. Raises `ModelLoadError` for a model that is not cut so."""
        plan = getattr(config, "base_model_tp_plan", None) or {}
        kinds = set(plan.values())
        missing = [name for name in SHARED_OUT if not hasattr(type(config), name)]
        if not plan or missing or not kinds <= _KINDS:
            reason = (
                "transformers has no plan for it"
                if not plan
                else f"its configuration has no {missing[0]}"
                if missing
                else f"its plan asks for {', '.join(sorted(kinds - _KINDS))}"
            )
            raise ModelLoadError(
                f"tensor_parallel_size must be 1 for a model of architecture {config.model_type!r}: {reason}"
            )
        self._kinds = [(_module_pattern(name), kind) for name, kind in plan.items()]

    def is_rowwise(self, module_name: str) -> bool:
        """Whether such a module gives only a part of a sum. A fused module may lie in the place of one around it."""
        return self._kind(module_name) == _ROWWISE

    def cut_dim(self, weight_name: str) -> int | None:
        """The dimension in which a weight or bias is cut; None: it is whole on every rank."""
        module_name, _, name = weight_name.rpartition(".")
        kind = self._kind(module_name)
        if kind == _COLWISE:
            return 0
        return 1 if kind == _ROWWISE and name == "weight" else None

    def _kind(self, module_name: str) -> str | None:
        return next((kind for pattern, kind in self._kinds if pattern.search(module_name)), None)


def shard_config(config: Any, rank: Rank) -> Any:
    """The config of the smaller model. Raises `ModelLoadError` if the ranks' parts would not be equal."""
    check_even(config.to_dict(), rank.size)
    smaller = deepcopy(config)
    smaller.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in SHARED_OUT:
        setattr(smaller, name, getattr(config, name) // rank.size)
    return smaller


def read_shard(weight_files: Iterable[Path], plan: ShardPlan, rank: Rank) -> dict[str, Tensor]:
    """A rank's slices of all weights, by name."""
    weights: dict[str, Tensor] = {}
    for path in weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                weights[name] = _slice(file.get_slice(name), plan.cut_dim(name), rank)
                if not rank.is_leader and name.endswith(".bias") and plan.is_rowwise(name.removesuffix(".bias")):
                    weights[name].zero_()  # of a sum it is added once
    return weights


def drop_output_layer(model: Any) -> None:
    """Leave a follower's model one column of logits: nobody reads them."""
    weight = model.get_output_embeddings().weight
    layer = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.ones((1, weight.shape[1]), dtype=weight.dtype), requires_grad=False)
    model.set_output_embeddings(layer)


def _slice(part: Any, dim: int | None, rank: Rank) -> Tensor:
    """part: a safetensors slice, of which what is taken is read."""
    if dim is None:
        whole: Tensor = part[:]
        return whole
    size = part.get_shape()[dim] // rank.size
    begin, end = rank.index * size, (rank.index + 1) * size
    taken: Tensor = part[begin:end] if dim == 0 else part[:, begin:end]
    return taken.contiguous()


def _module_pattern(name: str) -> re.Pattern[str]:
    """A plan names modules of the base model, with `*` for a number; a checkpoint may have a prefix before it."""
    return re.compile(r"(^|\.)" + re.escape(name).replace(r"\*", r"\d+") + "$")
