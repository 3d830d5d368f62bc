"""The end of a gateway process: responses may go on for a while, then the rest end so that clients can resume them."""

import asyncio


class Drain:
    """`is_draining` from SIGTERM on; `over` is set when the time for responses has run out."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.is_draining = False
        self.over = asyncio.Event()

    def begin(self) -> None:
        """In the event loop; a second call ends it at once."""
        seconds = 0.0 if self.is_draining else self._seconds
        self.is_draining = True
        asyncio.get_running_loop().call_later(seconds, self.over.set)
