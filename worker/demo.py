"""`promptmill demo`: a Redis, a worker and a viewer as three processes, started, watched and ended from here.

The viewer (`producer.demo_view`) is a plain client of the queues; this side knows only processes.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from worker import worker_process
from worker.embedded_redis import EmbeddedRedis
from worker.errors import StartRefusedError
from worker.settings import WorkerSettings
from worker.worker_process import ending

VIEWER = [sys.executable, "-m", "producer.demo_view"]
POLL_SECONDS = 0.1


def run_demo(settings: WorkerSettings) -> int:
    """The exit code: 0 if every prompt was answered. Raises EmbeddedRedisError, and StartRefusedError with the
    worker's own words if it ends early."""
    with TemporaryDirectory(prefix="promptmill-demo-") as folder, EmbeddedRedis() as server:
        environment = worker_process.environment_for(settings, server.url)
        log = Path(folder) / "worker.log"
        with log.open("wb") as sink:
            # In a session of its own: Ctrl-C ends the viewer, then we end the worker.
            worker = subprocess.Popen(
                worker_process.COMMAND, env=environment, stdout=sink, stderr=sink, start_new_session=True
            )
        with ending(worker), ending(subprocess.Popen(VIEWER, env=environment)) as viewer:
            while (code := viewer.poll()) is None:
                if worker.poll() is not None:
                    break
                time.sleep(POLL_SECONDS)
        if code is None:
            raise StartRefusedError(f"the demo's worker ended: {_last_words(log)}")
        return code


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or lines or ["it said nothing"])[-1]
