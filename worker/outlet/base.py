"""Where a job's full result is kept, if not in Redis."""

from typing import Protocol

from producer.contract import Result


class ResultStore(Protocol):
    """Implementations are thread-safe; both methods block."""

    def check(self) -> None:
        """Make sure that results can be written. Raises StartRefusedError naming the remedy."""

    def put(self, result: Result, attempt: int) -> Result:
        """Store `result` and return it as Redis is to keep it. The same call twice leaves the same.

        Raises ResultStoreError; nothing is lost then, and the call may be repeated.
        """
