"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens.

The search is the automaton of Aho and Corasick (1975): one state a character, linear in the text whatever the strings.
Its state is the longest suffix of the text that may still become a stop string; exactly that much is held back. The
outcome depends on the text alone, never on how it was cut into pieces: replaying the tokens replays the matcher.
"""

from collections import deque
from functools import lru_cache


class StopMatcher:
    """Releases text up to the first stop string to be completed; of two that end together, the longer one counts."""

    __slots__ = ("_automaton", "_held", "_state", "is_matched")

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._automaton = _automaton(stop)
        self._state = 0
        self._held = ""
        self.is_matched = False

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that is now known to precede any stop string. Once `is_matched`, nothing more is released.

        Unless it `may_end`, a stop string that this text completes is passed over, as text like any other.
        """
        if self.is_matched:
            return ""
        step, match_lengths = self._automaton.step, self._automaton.match_lengths
        state = self._state
        for position, character in enumerate(text):
            state = step(state, character)
            if may_end and match_lengths[state]:
                self.is_matched = True
                read = self._held + text[: position + 1]
                self._held = ""
                return read[: len(read) - match_lengths[state]]
        self._state = state
        read = self._held + text
        num_released = len(read) - self._automaton.depths[state]
        self._held = read[num_released:]
        return read[:num_released]

    def flush(self) -> str:
        """The text held back, once no more will follow: it did not become a stop string."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """A trie of the strings; `fails[s]` is the state of the longest proper suffix of state `s`."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.match_lengths = [0]  # of the longest stop string that ends in this state, 0 for none
        self.fails = [0]
        for string in strings:
            self._insert(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        edges, fails = self.edges, self.fails
        while True:
            following = edges[state].get(character)
            if following is not None:
                return following
            if not state:
                return 0
            state = fails[state]

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            following = self.edges[state].get(character)
            if following is None:
                following = len(self.edges)
                self.edges[state][character] = following
                self.edges.append({})
                self.depths.append(self.depths[state] + 1)
                self.match_lengths.append(0)
                self.fails.append(0)
            state = following
        self.match_lengths[state] = len(string)

    def _link(self) -> None:
        """Breadth first, so that a state's shorter suffixes are linked before it."""
        waiting = deque(self.edges[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self.edges[state].items():
                self.fails[following] = self.step(self.fails[state], character)
                self.match_lengths[following] = (
                    self.match_lengths[following] or self.match_lengths[self.fails[following]]
                )
                waiting.append(following)


@lru_cache(maxsize=32)  # jobs of one kind share their stop strings; a state takes 270 bytes
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    return _Automaton(stop)
