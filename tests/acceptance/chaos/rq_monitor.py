"""RQ's own command line, which somebody keeps running beside the workers: it cleans registries as it looks at them."""

import subprocess
import sys
import threading

PAUSE_SECONDS = 1.0
AWAY = ("onnect", "loading the dataset", "while reading")  # how redis-py words a Redis that is not there


class RqMonitor:
    """`rq info`, again and again, until the end of the block."""

    def __init__(self, url: str) -> None:
        self._command = [sys.executable, "-m", "rq.cli", "info", "--url", url]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="rq-info")
        self.num_looks = 0
        self.problems: list[str] = []

    def __enter__(self) -> "RqMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._is_over.wait(PAUSE_SECONDS):
            done = subprocess.run(self._command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0:
                self.num_looks += 1
            elif not any(word in done.stdout + done.stderr for word in AWAY):
                self.problems.append(f"rq info: {done.returncode} {done.stdout[-300:]} {done.stderr[-300:]}")
