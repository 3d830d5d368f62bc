"""Fuses a model's modules at load, each only if it computes what transformers' own does.

One forward of the unchanged model notes what every module is given and gives; a fused module is tried on the same and
replaces its original if it agrees. So no list of architectures is kept here: what does not match stays as it is. What
the fused modules are made of goes with the attention's backend: native passes on a CPU, Triton's kernels on a GPU.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention.base import AttentionRules, PageSlots
from engine.kernels.build import KernelBuildError
from engine.kernels.threads import one_thread
from engine.model.attention_hook import RowAttention, attention_of, attention_set_to
from engine.model.fused_modules import (
    FusedAttention,
    FusedMLP,
    FusedNorm,
    NativeAttentionModule,
    RowKernels,
)
from engine.model.native_decoder import is_plain
from engine.model.native_layer import NativeLayer

logger = logging.getLogger(__name__)

_NUM_TOKENS = 7
# Relative to the largest value. float32: sums in another order; else some roundings of values that differ so.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class FusionKit:
    """Makes a device's fused modules; each raises `AttributeError` where a module is not made of what it needs."""

    rows: RowKernels  # what norms and activations are computed with
    attention: Callable[..., FusedAttention]  # of the arguments of `FusedAttention`
    layer: Callable[[nn.Module], nn.Module]  # a whole decoder layer of fused parts
    link: Callable[[nn.Module, nn.Module], None] = lambda layer, following: None  # two of them, one after the other


@dataclass(frozen=True, slots=True)
class Fused:
    """What came of it."""

    name: str = ""  # names the fused arithmetic; empty: nothing was fused
    is_plain: bool = False  # see `native_decoder.is_plain`


def fuse_model(model: nn.Module, kit: FusionKit, device: torch.device, dtype: torch.dtype) -> Fused:
    """Replace what can be replaced."""
    with torch.inference_mode(), one_thread():
        fusion = Fusion(model, kit, device, dtype)
        counts = fusion.run()
    logger.info("action=fused %s plain=%s", counts, fusion.is_plain)
    return Fused(f"{kit.rows.build} {counts}{', plain' if fusion.is_plain else ''}", fusion.is_plain)


def choose_kit(uses_triton: bool, device: torch.device, dtype: torch.dtype, kernels_dir: Path) -> FusionKit | None:
    """What modules are fused with; None: with nothing."""
    if uses_triton:
        from engine.model.paged_modules import PagedAttentionModule, PagedLayer, link_layers
        from engine.model.triton_rows import TritonRows

        triton_rows = TritonRows()
        attention, layer = partial(PagedAttentionModule, triton_rows), partial(PagedLayer, triton_rows)
        return FusionKit(triton_rows, attention, layer, link_layers)
    from engine.model.native_rows import DTYPES, NativeRows

    if device.type != "cpu" or dtype not in DTYPES:
        return None
    try:
        native_rows = NativeRows(kernels_dir)
    except KernelBuildError as error:
        logger.warning("action=fusion_unavailable reason=%r", str(error))
        return None
    return FusionKit(native_rows, partial(NativeAttentionModule, native_rows), partial(NativeLayer, native_rows))


@dataclass(slots=True, eq=False)
class _Trial:
    """Stands in for the attention of one module: notes the rules, and mixes q, k and v into something cheap."""

    rules: AttentionRules | None = None
    head_dim: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules) -> Tensor:
        self.rules, self.head_dim = rules, query.shape[-1]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.attend_rows(q, k, v, rules)[None]

    def pages(self) -> PageSlots | None:
        return None

    def attend_written(self, q: Tensor, rules: AttentionRules) -> Tensor:
        raise AssertionError("a trial has no pages")

    def links(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rules: AttentionRules, band: int | None = None
    ) -> list[bytes] | None:
        return None

    def enter(self) -> None:
        raise AssertionError("a trial has no step")

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return (q + k.repeat_interleave(group, 1) * 0.5 + v.repeat_interleave(group, 1) * 0.25).contiguous()


@dataclass(slots=True)
class _Call:
    """What a module was given and gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    is_first_of_several: bool  # a module that gives a tuple is followed by one that gives a tuple


@dataclass(slots=True)
class Fusion:
    """The fusion of one model."""

    model: nn.Module
    kit: FusionKit
    device: torch.device
    dtype: torch.dtype
    is_plain: bool = False  # known once it has run
    _calls: dict[nn.Module, _Call] = field(default_factory=dict)
    _trials: dict[nn.Module, _Trial] = field(default_factory=dict)
    _on_trial: list[tuple[FusedAttention, RowAttention]] = field(default_factory=list)

    def run(self) -> str:
        attentions = {module: layer for module in self.model.modules() if (layer := attention_of(module)) is not None}
        self._observe(attentions)
        num_attentions = num_mlps = num_norms = num_layers = 0
        # Nothing but its parent holds a module that is replaced: the weights of two models may not fit.
        for parent, name in _places(self.model, lambda module: module in attentions or hasattr(module, "down_proj")):
            module = getattr(parent, name)
            if module in attentions:
                num_attentions += self._replace(parent, name, self._attention(module, attentions.pop(module)))
            else:
                num_mlps += self._replace(parent, name, self._mlp(module))
        for parent, name in _places(self.model, lambda module: type(module).__name__.endswith("RMSNorm")):
            num_norms += self._replace(parent, name, self._norm(getattr(parent, name)))
        places = _places(self.model, lambda module: hasattr(module, "self_attn"))
        for parent, name in places:
            num_layers += self._replace(parent, name, self._layer(getattr(parent, name)))
        if num_layers == len(places):
            for layer, following in pairwise(getattr(parent, name) for parent, name in places):
                self.kit.link(layer, following)
        self.is_plain = is_plain(self.model)
        for fused, layer in self._on_trial:
            fused.attention = layer
        counts = f"{num_attentions} attentions, {num_mlps} mlps, {num_norms} norms"
        return f"{counts}, {num_layers} layers" if num_layers else counts

    def _observe(self, attentions: dict[nn.Module, RowAttention]) -> None:
        """Run the model once with trials for attention, and note the calls of what may be fused."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            has_more = isinstance(output, tuple)
            self._calls[module] = _Call(args, kwargs, output[0] if has_more else output, has_more)

        watched = [
            module
            for module in self.model.modules()
            if module in attentions or hasattr(module, "down_proj") or hasattr(module, "self_attn")
        ]
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
        self._trials = {module: _Trial() for module in attentions}
        tokens = torch.arange(_NUM_TOKENS, device=self.device)[None]
        try:
            with attention_set_to(self._trials):
                self.model(input_ids=tokens * 3 + 1, position_ids=tokens * 2, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _attention(self, module: nn.Module, layer: RowAttention) -> nn.Module | None:
        trial = self._trials[module]
        if trial.rules is None or trial.head_dim % 2:
            return None
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        fused_norms = [None if norm is None else self._norm(norm) for norm in norms]
        if any(norm is not None and fused is None for norm, fused in zip(norms, fused_norms, strict=True)):
            return None
        with suppress(AttributeError):
            fused = self.kit.attention(module, trial.rules, (fused_norms[0], fused_norms[1]), trial.head_dim)
            fused.attention = trial
            for fused.rotates in (True, False):
                if self._agrees(module, fused):
                    self._on_trial.append((fused, layer))
                    return fused
        return None

    def _mlp(self, module: nn.Module) -> nn.Module | None:
        activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
        if module not in self._calls or activation is None:
            return None
        x = torch.linspace(-6, 6, 41)
        for is_gelu, twin in ((False, nn.functional.silu(x)), (True, nn.functional.gelu(x, approximate="tanh"))):
            if torch.allclose(activation(x), twin, atol=1e-6):
                with suppress(AttributeError):
                    fused = FusedMLP(self.kit.rows, module, is_gelu=is_gelu)
                    return fused if self._agrees(module, fused) else None
        return None

    def _norm(self, module: nn.Module) -> FusedNorm | None:
        """The variant that computes what the module does, rounding included, on random rows."""
        with suppress(AttributeError):
            for adds_one in (False, True):
                for rounds_first in (True, False):
                    fused = FusedNorm(self.kit.rows, module, adds_one=adds_one, rounds_first=rounds_first)
                    size = module.weight.shape[0]  # type: ignore[index]
                    x = torch.randn((5, int(size)), generator=torch.Generator().manual_seed(0)).to(
                        self.device, self.dtype
                    )
                    # One rounding of 16 bits at most, which a variant that rounds elsewhere passes often.
                    if self._is_close(fused(x), module(x), scale=1 if self.dtype == torch.float32 else 0.25):
                        return fused
        return None

    def _layer(self, module: nn.Module) -> nn.Module | None:
        if module not in self._calls:
            return None
        with suppress(AttributeError):
            fused = self.kit.layer(module)
            return fused if self._agrees(module, fused) else None
        return None

    def _agrees(self, module: nn.Module, fused: nn.Module) -> bool:
        call = self._calls[module]
        try:
            output = fused(*call.args, **call.kwargs)
        except Exception as error:  # made for other shapes or calls than this one's, or for another device
            logger.info("action=fusion_failed module=%s reason=%r", type(module).__name__, str(error)[:200])
            return False
        has_more = isinstance(output, tuple)
        return has_more == call.is_first_of_several and self._is_close(output[0] if has_more else output, call.output)

    def _is_close(self, output: Tensor, expected: Tensor, *, scale: float = 1) -> bool:
        if output.shape != expected.shape:
            return False
        difference = (output.float() - expected.float()).abs().max()
        return bool(difference <= scale * _TOLERANCE[self.dtype] * expected.float().abs().max())

    def _replace(self, parent: nn.Module, name: str, fused: nn.Module | None) -> bool:
        if fused is not None:
            original = getattr(parent, name)
            setattr(parent, name, fused)
            self._calls.pop(original, None)  # its weights go with the last that knows it
            self._trials.pop(original, None)
        return fused is not None


def _places(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str]]:
    """The wanted modules, each as its parent and its name there."""
    return [(parent, name) for parent in model.modules() for name, child in parent.named_children() if is_wanted(child)]
