"""Log-probabilities of tokens as arrays, on their way from the device to the parent. Values only."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """Entry i is one token's; `rows` says whose it is."""

    rows: NDArray[np.int64]  # [num_tokens]
    logprobs: NDArray[np.float32]  # [num_tokens]
    top_ids: NDArray[np.int32]  # [num_tokens, num_top], the likeliest first, equal ones by id
    top_logprobs: NDArray[np.float32]  # [num_tokens, num_top]

    def with_rows(self, rows: NDArray[np.int64]) -> Self:
        return replace(self, rows=rows)

    def moved(self, num_rows: int) -> Self:
        """The same tokens, so many rows further down."""
        return self.with_rows(self.rows + num_rows)

    def of_rows(self, keep: NDArray[np.bool_]) -> Self:
        """The tokens of the rows to keep, once the others are gone; `keep`: bool, one a row."""
        kept = self.select(keep[self.rows])
        return kept.with_rows((np.cumsum(keep) - 1)[kept.rows])

    def entry_of_row(self) -> dict[int, int]:
        return {row: entry for entry, row in enumerate(self.rows.tolist())}

    def select(self, keep: NDArray[np.bool_]) -> Self:
        """The entries for which `keep` is true."""
        return replace(
            self,
            rows=self.rows[keep],
            logprobs=self.logprobs[keep],
            top_ids=self.top_ids[keep],
            top_logprobs=self.top_logprobs[keep],
        )

    def top(self, entry: int, num_top: int) -> list[tuple[int, float]]:
        """The `num_top` likeliest tokens of one entry and their log-probabilities."""
        ids, logprobs = self.top_ids[entry, :num_top].tolist(), self.top_logprobs[entry, :num_top].tolist()
        return list(zip(ids, logprobs, strict=True))


def concatenate(parts: Iterable[TokenLogprobs | None]) -> TokenLogprobs | None:
    """All entries, in order; None if there are none. Narrower parts are padded: nobody asked for more of them."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    width = max(part.top_ids.shape[1] for part in given)
    return TokenLogprobs(
        np.concatenate([part.rows for part in given]),
        np.concatenate([part.logprobs for part in given]),
        np.concatenate([_widen(part.top_ids, width) for part in given]),
        np.concatenate([_widen(part.top_logprobs, width) for part in given]),
    )


def _widen(array: NDArray[Any], width: int) -> NDArray[Any]:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))
