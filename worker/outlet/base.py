"""The interface of stores for full results outside Redis."""

from typing import Protocol

from producer.contract import Result


class ResultStore(Protocol):
    """Implementations are thread-safe; both methods block."""

    def check(self) -> None:
        """Make sure that results can be written. Raises StartRefusedError naming the remedy."""

    def put(self, result: Result, attempt: int) -> Result:
        """Store `result` and return what Redis is to keep of it. Idempotent.

        Raises ResultStoreError; the call may be repeated.
        """
