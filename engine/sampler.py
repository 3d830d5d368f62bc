"""Draws one token for every row of logits: a single batched call with each row's own parameters.

Owns the filters and the choice. Knows nothing of sequences; the runner hands it one row a sequence.

With x = (logits - max) / temperature and w = e^x, the filters keep, one after the other,
- min-p: the tokens with w >= min_p (the largest w is 1);
- top-k: the tokens with x >= the k-th largest x, so all that tie with it;
- top-p: the fewest most probable tokens of those left that hold top_p of their mass, and all that tie with the last.
Each is a threshold on x, so the order of tokens never matters. The token is the one with the largest x + noise among
those left: the Gumbel maximum, distributed as the softmax over them. A row's token depends on nothing but its own
logits and parameters.

No row is sorted whole unless it must be: thresholds are sought among the `_NUM_CANDIDATES` largest logits, and a row
whose threshold lies deeper is done again over the whole vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling_noise import gumbel_noise, row_keys

_NUM_CANDIDATES = 256
_SUM_WIDTH = 256  # columns summed at a time: torch splits longer sums by the number of threads and rows
_MAX_NOISE_VALUES = 1 << 18  # noise values held at once: keeps the passes over them in the CPU's cache


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

    def select(self, rows: Tensor) -> "SamplingBatch":
        """The batch of some rows; rows: int64 `[num_selected]`."""
        return SamplingBatch(*(getattr(self, name)[rows] for name in self.__slots__))

    def has_filter(self) -> Tensor:
        """bool `[num_rows]`: whether any filter is on."""
        return (self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)


class Sampler:
    """Temperature, then min-p, top-k, top-p, then the keyed Gumbel maximum."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Return int64 `[num_rows]` for logits float32 `[num_rows, vocab_size]`.

        Greedy rows take the largest logit, the lowest id among equals.
        """
        tokens = logits.argmax(dim=-1)
        random = batch.temperature > 0
        for rows, draw in (
            (random & batch.has_filter(), _draw_filtered),
            (random & ~batch.has_filter(), _draw_unfiltered),
        ):
            selected = rows.nonzero()[:, 0]
            if len(selected):
                part = batch.select(selected)
                tokens[selected] = draw(_scale(logits[selected], part.temperature), part)
        return tokens


def _scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """x of the module's docstring. Mutates logits. The maximum goes first: a tiny temperature must not overflow."""
    return logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None])


def _draw_unfiltered(x: Tensor, batch: SamplingBatch) -> Tensor:
    num_rows, vocab_size = x.shape
    keys = row_keys(batch.seed, batch.choice, batch.position)
    token_ids = torch.arange(vocab_size, dtype=torch.int32, device=x.device)
    step = max(1, _MAX_NOISE_VALUES // vocab_size) if x.device.type == "cpu" else num_rows
    tokens = [
        gumbel_noise(keys[:, first : first + step], token_ids).add_(x[first : first + step]).argmax(dim=-1)
        for first in range(0, num_rows, step)
    ]
    return torch.cat(tokens)


def _draw_filtered(x: Tensor, batch: SamplingBatch) -> Tensor:
    num_candidates = min(_NUM_CANDIDATES, x.shape[1])
    tokens, is_settled = _draw_among_candidates(x, batch, num_candidates)
    if num_candidates < x.shape[1]:
        rest = (~is_settled).nonzero()[:, 0]
        if len(rest):
            tokens[rest], _ = _draw_among_candidates(x[rest], batch.select(rest), x.shape[1])
    return tokens


def _draw_among_candidates(x: Tensor, batch: SamplingBatch, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Draw from the largest x alone: tokens int64 `[num_rows]`, and whether these candidates were enough for each."""
    values, token_ids = x.topk(num_candidates, dim=-1)  # in descending order
    kept, is_settled = _keep(values, x, batch)
    noise = gumbel_noise(row_keys(batch.seed, batch.choice, batch.position), token_ids.to(torch.int32))
    choice = (values + noise).masked_fill_(~kept, float("-inf")).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, choice)[:, 0], is_settled


def _keep(values: Tensor, x: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Which of the candidates the filters keep, bool like values, and for which rows that is all they keep.

    values: the row's largest x in descending order, float32 `[num_rows, num_candidates]`.
    """
    num_candidates = values.shape[1]
    is_whole = num_candidates == x.shape[1]
    weights = values.double().exp_()
    kept = weights >= batch.min_p[:, None]
    has_top_k = (batch.top_k > 0) & (batch.top_k <= num_candidates)
    kth_value = values.gather(1, (batch.top_k - 1).clamp_(0, num_candidates - 1)[:, None])
    kept &= (values >= kth_value) | ~has_top_k[:, None]
    has_all = ~kept[:, -1] | is_whole  # min-p and top-k leave nothing outside the candidates
    mass = (weights * kept).cumsum_(dim=-1)
    total = torch.where(has_all, mass[:, -1], _kept_mass(x, batch, has_all))
    mass_before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    in_nucleus = kept & (mass_before < (batch.top_p * total)[:, None])
    last = values.masked_fill(~in_nucleus, float("inf")).amin(dim=-1, keepdim=True)
    kept &= (values >= last) | (batch.top_p >= 1)[:, None]
    # Top-k beyond the candidates changes the mass that top-p shares out, so such a row is never settled early.
    is_settled = has_all | ((batch.top_k == 0) & ~kept[:, -1])
    return kept, is_settled & ((batch.top_k <= num_candidates) | is_whole)


def _kept_mass(x: Tensor, batch: SamplingBatch, is_known: Tensor) -> Tensor:
    """Mass float64 `[num_rows]` of what min-p keeps of the whole vocabulary; 0 where it is known already."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    rows = (~is_known).nonzero()[:, 0]
    if len(rows):
        weights = x[rows].exp_()
        weights *= weights >= batch.min_p[rows, None]
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _SUM_WIDTH))
        total[rows] = weights.view(len(rows), -1, _SUM_WIDTH).sum(dim=-1).double().sum(dim=-1)
    return total
