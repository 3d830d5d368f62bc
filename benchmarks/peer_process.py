"""What every peer's process shares: one workload a line in, one measurement a line out. Standard library alone.

In: `{"prompts": [[id, ...]], "max_tokens": [n, ...]}`. Out: `{"seconds", "counts", "firsts", "lasts"}`: of the run, of
each prompt the tokens, and the seconds to its first and last one (missing where the peer does not tell). The first line
out is `{}`, once the model is loaded.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Measurement = dict[str, Any]
Run = Callable[[list[list[int]], list[int]], Measurement]


def serve(load: Callable[..., Run], *arguments: str) -> None:
    """Load the model and run every workload of stdin. What a library prints to stdout goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = load(*arguments)
    reply: Measurement = {}
    while True:
        print(json.dumps(reply), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        workload = json.loads(line)
        reply = run(workload["prompts"], workload["max_tokens"])


class Stopwatch:
    """Times of each prompt's first and last token, for peers that hand tokens out as they come."""

    def __init__(self, num_prompts: int, now: Callable[[], float]) -> None:
        self._now = now
        self._start = now()
        self.counts = [0] * num_prompts
        self._firsts = [0.0] * num_prompts
        self._lasts = [0.0] * num_prompts

    def took(self, prompt: int, num_tokens: int) -> None:
        """Some tokens of a prompt are there."""
        seconds = self._now() - self._start
        if not self.counts[prompt]:
            self._firsts[prompt] = seconds
        self.counts[prompt] += num_tokens
        self._lasts[prompt] = seconds

    def measurement(self) -> Measurement:
        seconds = self._now() - self._start
        return {"seconds": seconds, "counts": self.counts, "firsts": self._firsts, "lasts": self._lasts}
