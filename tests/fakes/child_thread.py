"""The engine's core on a thread of the test's own process, which starts at once and can be looked into."""

import contextlib
import os
import socket
import threading
import traceback

from engine.child import ChildPipe, serve
from engine.process import Child, ParentPipe

_LEAVE_SECONDS = 0.5
_END_SECONDS = 2.0


class ChildThread(Child):
    """It cannot be killed within a step, only cut off."""

    def _start(self, child_pipe: ChildPipe) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(child_pipe,), name="engine-core", daemon=True)
        self._thread.start()

    def _run(self, child_pipe: ChildPipe) -> None:
        try:
            serve(child_pipe, on_parent_gone=lambda: None)
        except Exception as error:
            traceback.print_exc()
            self._error = error
        finally:
            _shut_down(child_pipe)  # wakes the thread that reads it; closing alone would not

    def kill(self) -> None:
        _shut_down(self.pipe)

    def _end(self) -> str:
        self._thread.join(_LEAVE_SECONDS)
        _shut_down(self.pipe)
        self._thread.join(_END_SECONDS)
        return f"the engine thread ended with {self._error!r}" if self._error else "the engine thread ended"


def _shut_down(pipe: "ParentPipe | ChildPipe") -> None:
    """Both directions, for both ends: whoever reads or writes is woken."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
