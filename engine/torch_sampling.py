"""The sampler's passes over whole rows of logits in torch, on any device: what is fused has its twin here.

`engine.sampler` states the rules. Sums are made in an order that depends on nothing but a row's length.
"""

import torch
from torch import Tensor

from engine.sampling_noise import gumbel_noise
from engine.step_plan import BAD_LOGITS

MAX_NOISE_VALUES = 1 << 18  # noise values held at once: keeps the passes over them in the CPU's cache
_SUM_WIDTH = 256  # columns summed at a time: torch splits longer sums by the number of threads and rows
_MAX_ORDERED = 1 << 23  # logits held as 64-bit integers at once: 256 rows of 150,000 would be gigabytes on a GPU


class TorchPasses:
    """`VocabularyPasses` on any device."""

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """See `VocabularyPasses.mask`."""
        places = torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = ((bits[:, :, None] >> places) & 1).view(len(rows), -1)[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill_(is_allowed == 0, float("-inf"))

    def argmax(self, logits: Tensor) -> Tensor:
        """See `VocabularyPasses.argmax`."""
        return logits.argmax(dim=-1)

    def settle(self, logits: Tensor, tokens: Tensor) -> None:
        """See `VocabularyPasses.settle`."""
        is_sound = logits[:, 0] < float("inf")
        is_sound &= logits.gather(1, tokens[:, None])[:, 0].abs() < float("inf")  # nor is NaN
        tokens.masked_fill_(~is_sound, BAD_LOGITS)

    def draw(self, logits: Tensor, rows: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
        """See `VocabularyPasses.draw`."""
        vocab_size = logits.shape[1]
        token_ids = torch.arange(vocab_size, dtype=torch.int32, device=logits.device)
        count = max(1, MAX_NOISE_VALUES // vocab_size) if logits.device.type == "cpu" else len(rows)
        tokens = []
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            x = scale(logits[rows[part]], temperature[part])
            tokens.append(gumbel_noise(keys[:, part], token_ids).add_(x).argmax(dim=-1))
        return torch.cat(tokens)

    def candidates(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, min_p: Tensor, num_candidates: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VocabularyPasses.candidates`."""
        x = scale(logits[rows], temperature)
        values, token_ids = x.topk(num_candidates, dim=-1)
        weights = x.exp_()
        weights *= weights >= min_p[:, None]
        return values, token_ids, sum_rows(weights)

    def likeliest(self, logits: Tensor, rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See `VocabularyPasses.likeliest`."""
        parts = [
            _likeliest(logits[some], num_tokens) for some in torch.split(rows, _MAX_ORDERED // logits.shape[1] + 1)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _likeliest(x: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """As `VocabularyPasses.likeliest`, of all rows of x. Mutates x."""
    token_ids = x.shape[1] - 1 - (_ordered(x).topk(num_tokens, dim=-1).values & 0xFFFFFFFF)
    most = x.amax(dim=-1, keepdim=True)
    return token_ids, most[:, 0].double() + sum_rows(x.sub_(most).exp_()).log_()


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """x of sampler's docstring. Mutates logits. The maximum goes first: a tiny temperature must not overflow."""
    return logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None])


def sum_rows(weights: Tensor) -> Tensor:
    """float64 `[num_rows]`, in an order that depends on nothing but the row's length."""
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _SUM_WIDTH))
    return weights.view(len(weights), -1, _SUM_WIDTH).sum(dim=-1).double().sum(dim=-1)


def _ordered(x: Tensor) -> Tensor:
    """int64 in the order of float32 x, where x ties in that of falling ids, which stand in the low half."""
    ids = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return (ordered_bits(x).to(torch.int64) << 32) | ids


def ordered_bits(x: Tensor) -> Tensor:
    """int32 in the order of float32 x."""
    bits = (x + 0.0).view(torch.int32)  # -0 becomes 0, its equal
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
