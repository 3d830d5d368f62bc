"""The sequences that wait for a slot: who is next, and why nobody waits for ever.

Order: priority (lower first), then deadline (earlier first, none last), then arrival. A preempted sequence comes back
with its own arrival, ahead of everyone younger. Strict urgency alone would starve: so when `MAX_OVERTAKINGS` admissions
in a row have passed over the oldest sequence here, that one becomes the most urgent of all (`PROMOTED`), for good. So
a sequence with k older ones ahead of it is admitted after at most (k + 1) * (MAX_OVERTAKINGS + 1) admissions.

All operations take O(log n) at most; removal is lazy, so that 100,000 waiting sequences cost a step nothing.
"""

import heapq
from math import inf

from engine.sequence import Sequence

MAX_OVERTAKINGS = 16
PROMOTED = -(2**62)  # a priority below any that a request may have; among the promoted arrival decides


class WaitingQueue:
    """Two lazily cleaned heaps over one table: by urgency, and by arrival."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        self._by_urgency: list[tuple[int, float, int]] = []  # Sequence.urgency
        self._by_arrival: list[int] = []
        self._num_overtakings = 0

    def push(self, sequence: Sequence) -> None:
        """Add a sequence, new or preempted."""
        self._sequences[sequence.sequence_id] = sequence
        heapq.heappush(self._by_urgency, sequence.urgency)
        heapq.heappush(self._by_arrival, sequence.sequence_id)
        if max(len(self._by_urgency), len(self._by_arrival)) > 2 * len(self._sequences) + 64:
            self._rebuild()

    def head(self) -> Sequence | None:
        """Who is next. Promotes the oldest if it was overtaken too often."""
        if not self._sequences:
            return None
        oldest = self._sequences[self._oldest()]
        if self._num_overtakings >= MAX_OVERTAKINGS and oldest.priority != PROMOTED:
            oldest.priority, oldest.deadline = PROMOTED, -inf
            heapq.heappush(self._by_urgency, oldest.urgency)
        return self._sequences[self._most_urgent()]

    def admit(self, sequence: Sequence) -> None:
        """Take out the head because it runs now."""
        overtook = sequence.sequence_id != self._oldest()
        self._num_overtakings = self._num_overtakings + 1 if overtook else 0
        del self._sequences[sequence.sequence_id]

    def remove(self, sequence_id: int) -> Sequence | None:
        """Take out any sequence; None if it does not wait here."""
        if sequence_id in self._sequences and sequence_id == self._oldest():
            self._num_overtakings = 0  # the next one may have come when all of them had happened
        return self._sequences.pop(sequence_id, None)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def _most_urgent(self) -> int:
        heap = self._by_urgency  # who was promoted is there twice; the entry that counts is ahead of the other
        while heap[0][-1] not in self._sequences:
            heapq.heappop(heap)
        return heap[0][-1]

    def _oldest(self) -> int:
        heap = self._by_arrival
        while heap[0] not in self._sequences:
            heapq.heappop(heap)
        return heap[0]

    def _rebuild(self) -> None:
        """Drop the entries of sequences that left."""
        self._by_urgency = [sequence.urgency for sequence in self._sequences.values()]
        self._by_arrival = list(self._sequences)
        heapq.heapify(self._by_urgency)
        heapq.heapify(self._by_arrival)
