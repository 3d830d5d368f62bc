"""Receives commands while the worker runs: RQ's on the worker's own channel, and cancels on the channel of all workers.

Pub/sub may lose messages: a missed cancel is noticed by the next heartbeat, because cancelling changes RQ's status too.
"""

import json
import logging
from collections.abc import Callable

import redis

from producer.contract import keys
from worker.listener_thread import ListenerThread

POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class ControlListener(ListenerThread):
    """Listens for commands. Callbacks run on its thread."""

    def __init__(
        self,
        client: redis.Redis,
        command_channel: str,
        *,
        on_cancel: Callable[[str], None],
        on_stop_job: Callable[[str], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        super().__init__("control")
        self._client = client
        self._command_channel = command_channel
        self._on_cancel = on_cancel
        self._on_stop_job = on_stop_job
        self._on_shutdown = on_shutdown

    def _listen(self) -> None:
        with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(self._command_channel, keys.CANCEL_CHANNEL)
            while not self.is_stopping:
                message = pubsub.get_message(timeout=POLL_SECONDS)
                if message is not None:
                    self._handle(message["channel"].decode(), message["data"])

    def _handle(self, channel: str, data: bytes) -> None:
        if channel == keys.CANCEL_CHANNEL:
            self._on_cancel(data.decode(errors="replace"))
            return
        try:
            command = json.loads(data)
            self._obey(str(command["command"]), str(command.get("job_id", "")))
        except (ValueError, LookupError, TypeError, AttributeError):
            _log.warning("action=command_ignored data=%.200r", data)

    def _obey(self, command: str, job_id: str) -> None:
        _log.info("action=command command=%s job_id=%s", command, job_id)
        if command in ("stop-job", "stop-execution"):
            self._on_stop_job(job_id)
        elif command == "shutdown":
            self._on_shutdown()
        else:
            _log.warning("action=command_ignored command=%s reason=no_work_horse", command)
