"""Draws one token for every row of logits: a single batched call with each row's own parameters.

Owns the filters and the choice. Knows nothing of sequences; the runner hands it one row a sequence.

With x = (logits - max) / temperature and w = e^x, the filters keep, one after the other,
- min-p: the tokens with w >= min_p (the largest w is 1);
- top-k: the tokens with x >= the k-th largest x, so all that tie with it;
- top-p: the fewest most probable tokens of those left that hold top_p of their mass, and all that tie with the last.
Each is a threshold on x, so the order of tokens never matters. The token is the one with the largest x + noise among
those left: the Gumbel maximum, distributed as the softmax over them. A row's token depends on nothing but its own
logits and parameters.

No row is sorted whole: thresholds are sought among the `_NUM_CANDIDATES` largest logits, and for a row whose threshold
lies deeper by halving the range of x.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.kernels.build import KernelBuildError
from engine.logit_editor import LogitEditor
from engine.native_sampling import NativeSampling
from engine.row_logprobs import RowLogprobs, normalized
from engine.sampling_noise import gumbel_noise, row_keys
from engine.sampling_params import has_filter
from engine.torch_sampling import MAX_NOISE_VALUES, TorchPasses, ordered_bits, scale, sum_rows

logger = logging.getLogger(__name__)

_NUM_CANDIDATES = 256


@dataclass(slots=True)
class SamplingBatch:
    """The parameters of each row; tensors on the logits' device, `num_rows` long."""

    temperature: Tensor  # float32; 0 is greedy
    top_p: Tensor  # float32 in (0, 1]; 1 is off
    top_k: Tensor  # int64; 0 is off
    min_p: Tensor  # float32 in [0, 1]; 0 is off
    seed: Tensor  # int64
    choice: Tensor  # int64
    position: Tensor  # int64, index of the token being sampled in prompt + output
    may_draw: bool = True  # False: the host knows that all rows are greedy
    may_cut: bool = True  # False: likewise, that no row is drawn with top-k or top-p

    def to(self, device: torch.device) -> "SamplingBatch":
        """The batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "SamplingBatch":
        """The batch of some rows; rows: int64 `[num_selected]`."""
        return self._each(lambda tensor: tensor[rows])

    def first(self, count: int, *, may_draw: bool, may_cut: bool) -> "SamplingBatch":
        """The batch of the first rows, of which the host knows this."""
        return replace(self._each(lambda tensor: tensor[:count]), may_draw=may_draw, may_cut=may_cut)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SamplingBatch":
        values = {name: getattr(self, name) for name in self.__slots__}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def keys(self) -> Tensor:
        """Keys of the rows' noise, int32 `[2, num_rows]`."""
        return row_keys(self.seed, self.choice, self.position)

    def has_filter(self) -> Tensor:
        """bool `[num_rows]`: whether any filter is on."""
        result: Tensor = has_filter(self.top_p, self.top_k, self.min_p)
        return result


class VocabularyPasses(Protocol):
    """What reads whole rows of logits, and leaves them as they are."""

    def argmax(self, logits: Tensor) -> Tensor:
        """The largest logit of each row, the lowest id among equals: int64 `[num_rows]`."""
        ...

    def settle(self, logits: Tensor, tokens: Tensor) -> None:
        """Make `BAD_LOGITS` of a row's token where its logit is no finite number, or the row's first NaN or infinite.

        tokens: int64 `[num_rows]`. A bad hidden state spoils its whole row of logits, so that one column tells.
        """
        ...

    def draw(self, logits: Tensor, rows: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
        """The Gumbel maximum over the whole vocabulary of some rows: int64 `[num_rows]`.

        rows: int64 `[num_rows]`, which rows of logits; temperature: float32 `[num_rows]`; keys: int32 `[2, num_rows]`.
        """
        ...

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """Make minus infinity of the logits whose bit is 0. Mutates some rows; bits: int32 `[num_rows, num_words]`."""
        ...

    def candidates(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, min_p: Tensor, num_candidates: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The largest x of some rows in descending order, their ids, and the mass that min-p keeps of the vocabulary.

        Returns float32 and integer `[num_rows, num_candidates]`, and float64 `[num_rows]`.
        """
        ...

    def likeliest(self, logits: Tensor, rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The tokens with some rows' largest logits, in descending order, equal ones by id; log of the sum of e^logit.

        Returns int64 `[num_rows, num_tokens]` and float64 `[num_rows]`.
        """
        ...


class Sampler:
    """Temperature, then min-p, top-k, top-p, then the keyed Gumbel maximum."""

    editor: type[LogitEditor] = LogitEditor  # what changes the logits before

    def __init__(self, passes: VocabularyPasses | None = None) -> None:
        """`passes`: torch's, on any device, if None."""
        self._passes = passes or TorchPasses()

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Return int64 `[num_rows]` for logits float32 `[num_rows, vocab_size]`.

        Greedy rows take the largest logit, the lowest id among equals.
        """
        if not batch.may_draw:
            return self._passes.argmax(logits)
        is_random = batch.temperature > 0
        has_filter = batch.has_filter()
        filtered = (is_random & has_filter).nonzero()[:, 0]
        unfiltered = (is_random & ~has_filter).nonzero()[:, 0]
        if len(filtered) + len(unfiltered) < len(logits):
            tokens = self._passes.argmax(logits)
        else:
            tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        if len(unfiltered):
            part = batch.select(unfiltered)
            tokens[unfiltered] = self._passes.draw(logits, unfiltered, part.temperature, part.keys())
        if len(filtered):
            tokens[filtered] = self._draw_filtered(logits, filtered, batch.select(filtered))
        return tokens

    def settle(self, logits: Tensor, tokens: Tensor) -> None:
        """See `VocabularyPasses.settle`."""
        self._passes.settle(logits, tokens)

    def logprobs(self, logits: Tensor, rows: Tensor, num_top: int) -> RowLogprobs:
        """The log-softmax of some rows, int64 `[num_wanted]`, and their `num_top` likeliest tokens."""
        top_ids, normalizers = self._passes.likeliest(logits, rows, min(num_top, logits.shape[1]))
        return RowLogprobs(rows, top_ids, normalized(logits, rows[:, None], top_ids, normalizers), normalizers)

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """See `VocabularyPasses.mask`."""
        self._passes.mask(logits, rows, bits)

    def _draw_filtered(self, logits: Tensor, rows: Tensor, part: SamplingBatch) -> Tensor:
        vocab_size = logits.shape[1]
        tokens, is_settled = self._draw_among(logits, rows, part, min(_NUM_CANDIDATES, vocab_size))
        deep = (~is_settled).nonzero()[:, 0]
        count = max(1, MAX_NOISE_VALUES // vocab_size)
        for first in range(0, len(deep), count):
            some = deep[first : first + count]
            tokens[some] = _draw_deep(scale(logits[rows[some]], part.temperature[some]), part.select(some))
        return tokens

    def _draw_among(
        self, logits: Tensor, rows: Tensor, part: SamplingBatch, num_candidates: int
    ) -> tuple[Tensor, Tensor]:
        """Draw from the largest x alone: tokens int64 `[num_rows]`, and whether these candidates were enough."""
        is_whole = num_candidates == logits.shape[1]
        values, token_ids, mass = self._passes.candidates(logits, rows, part.temperature, part.min_p, num_candidates)
        kept, is_settled = _keep(values, mass, part, is_whole=is_whole)
        scores = values + gumbel_noise(part.keys(), token_ids.to(torch.int32))
        choice = scores.masked_fill_(~kept, float("-inf")).argmax(dim=-1, keepdim=True)
        return token_ids.gather(1, choice)[:, 0].to(torch.int64), is_settled


def create_sampler(device: torch.device, cache_dir: Path, *, uses_triton: bool = False) -> Sampler:
    """The fastest sampler that works on the device; cache_dir: where compiled kernels are kept."""
    if uses_triton:
        from engine.triton_sampling import TritonSampler

        return TritonSampler()
    if device.type == "cpu":
        try:
            return Sampler(NativeSampling(cache_dir / "kernels"))
        except KernelBuildError as error:
            logger.warning("action=sampling_in_torch cost='slower than the native kernel' reason=%r", str(error))
    return Sampler()


def _keep(values: Tensor, mass: Tensor, batch: SamplingBatch, *, is_whole: bool) -> tuple[Tensor, Tensor]:
    """Which of the candidates the filters keep, bool like values, and for which rows that is all they keep.

    values: the row's largest x in descending order, float32 `[num_rows, num_candidates]`; mass: what min-p keeps of the
    vocabulary, float64 `[num_rows]`; is_whole: the candidates are the vocabulary.
    """
    num_candidates = values.shape[1]
    weights = values.double().exp_()
    kept = (values.exp() >= batch.min_p[:, None]) & (values > float("-inf"))
    has_top_k = (batch.top_k > 0) & (batch.top_k <= num_candidates)
    kth_value = values.gather(1, (batch.top_k - 1).clamp_(0, num_candidates - 1)[:, None])
    kept &= (values >= kth_value) | ~has_top_k[:, None]
    has_all = ~kept[:, -1] | is_whole  # min-p and top-k leave nothing outside the candidates
    mass_to = (weights * kept).cumsum_(dim=-1)
    total = torch.where(has_all, mass_to[:, -1], mass)
    mass_before = torch.nn.functional.pad(mass_to[:, :-1], (1, 0))
    in_nucleus = kept & (mass_before < (batch.top_p * total)[:, None])
    last = values.masked_fill(~in_nucleus, float("inf")).amin(dim=-1, keepdim=True)
    kept &= (values >= last) | (batch.top_p >= 1)[:, None]
    # Top-k beyond the candidates changes the mass that top-p shares out, so such a row is never settled early.
    is_settled = has_all | ((batch.top_k == 0) & ~kept[:, -1])
    return kept, is_settled & ((batch.top_k <= num_candidates) | is_whole)


def _draw_deep(x: Tensor, batch: SamplingBatch) -> Tensor:
    """Tokens int64 `[num_rows]` of rows whose thresholds lie anywhere in x, float32 `[num_rows, vocab_size]`."""
    vocab_size = x.shape[1]
    weights = x.exp()
    kept = (weights >= batch.min_p[:, None]) & (x > float("-inf"))
    has_top_k = (batch.top_k > 0) & (batch.top_k < vocab_size)
    order = ordered_bits(x)
    if has_top_k.any():
        num_above = (batch.top_k - 1).clamp_(0, vocab_size - 1)[:, None]
        kth = _lowest(order, lambda threshold: (order > threshold).sum(dim=-1, keepdim=True) <= num_above)
        kept &= (order >= kth) | ~has_top_k[:, None]
    if (batch.top_p < 1).any():
        weights = weights * kept
        wanted = (batch.top_p * sum_rows(weights))[:, None]
        last = _lowest(order, lambda threshold: sum_rows(weights * (order > threshold))[:, None] < wanted)
        kept &= (order >= last) | (batch.top_p >= 1)[:, None]
    scores = x + gumbel_noise(batch.keys(), torch.arange(vocab_size, dtype=torch.int32, device=x.device))
    return scores.masked_fill_(~kept, float("-inf")).argmax(dim=-1)


def _lowest(order: Tensor, is_enough: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each row the least threshold, int32 `[num_rows, 1]`, that `is_enough`: what lies above it is little enough.

    Such a threshold is the order of some logit. All thresholds above one that is enough are.
    """
    high = order.amax(dim=-1, keepdim=True).to(torch.int64)
    low = order.amin(dim=-1, keepdim=True).to(torch.int64)
    for _ in range(32):  # the range of float32's orders
        middle = (low + high) >> 1
        enough = is_enough(middle.to(torch.int32))
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, (middle + 1).minimum(high))
    return high.to(torch.int32)
