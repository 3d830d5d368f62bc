"""The worker of `queue_cost`: an ordinary one, whose engine also takes work past the queue, between two jobs.

So one and the same child computes both, and what is compared is not two processes. A line of JSON on stdin is a slice
of work, a line of JSON on stdout what it took here: seconds, and CPU seconds of this process and of its child.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import worker.run
from benchmarks.process_figures import children, cpu_seconds
from engine import InferenceEngine, SamplingParams
from worker.cli import worker as worker_command


class ShortcutEngine(InferenceEngine):
    """Once it runs, a thread of its own serves stdin."""

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._serve, name="shortcut", daemon=True).start()

    def _serve(self) -> None:
        (child_pid,) = children(os.getpid())
        for line in sys.stdin:
            print(json.dumps(self._take(json.loads(line), child_pid)), flush=True)

    def _take(self, work: dict[str, Any], child_pid: int) -> dict[str, Any]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in work["max_tokens"]]
        before = time.perf_counter(), cpu_seconds(os.getpid()), cpu_seconds(child_pid)
        outputs = self.generate_batch(work["prompts"], params)
        after = time.perf_counter(), cpu_seconds(os.getpid()), cpu_seconds(child_pid)
        seconds, parent, child = (end - start for start, end in zip(before, after, strict=True))
        token_ids = [output.token_ids for output in outputs]
        return {"seconds": seconds, "parent": parent, "child": child, "token_ids": token_ids}


if __name__ == "__main__":
    worker.run.InferenceEngine = ShortcutEngine  # type: ignore[attr-defined]
    worker_command()
