"""`promptmill demo`: a Redis, a worker, a gateway and a viewer as processes, started, watched and ended from here.

The viewer (`producer.demo_view`) is a plain client of the queues; this side knows only processes.
"""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from worker import gateway_process, worker_process
from worker.embedded_redis import EmbeddedRedis
from worker.errors import StartRefusedError
from worker.settings import WorkerSettings
from worker.started_process import running

VIEWER = [sys.executable, "-P", "-m", "producer.demo_view"]
POLL_SECONDS = 0.1


def run_demo(settings: WorkerSettings) -> int:
    """The exit code: 0 if every prompt was answered. Raises EmbeddedRedisError, and StartRefusedError with the
    worker's own words if it ends early."""
    with EmbeddedRedis() as server, TemporaryDirectory(prefix="promptmill-demo-") as folder:
        environment = worker_process.environment_for(settings, server.url)
        log = Path(folder) / "worker.log"
        with ExitStack() as stack:
            sink = stack.enter_context(log.open("wb"))
            # In a session of its own: Ctrl-C ends the viewer, then we end the worker.
            worker = stack.enter_context(
                running(worker_process.COMMAND, env=environment, stdout=sink, stderr=sink, start_new_session=True)
            )
            http_port = _start_gateway(stack, environment, Path(folder) / "files")
            viewer = stack.enter_context(running(VIEWER, env=environment))
            while (code := viewer.poll()) is None:
                if worker.poll() is not None:
                    break
                time.sleep(POLL_SECONDS)
            if code == 0 and http_port is not None:
                code = _curl(settings, http_port)
        if code is None:
            raise StartRefusedError(f"the demo's worker ended: {_last_words(log)}")
        return code


def _start_gateway(stack: ExitStack, environment: dict[str, str], files: Path) -> int | None:
    """Its port; None where the demo goes without, for want of its packages or of curl."""
    if not gateway_process.is_installed() or shutil.which("curl") is None:
        return None
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    fd = listener.fileno()
    stack.enter_context(
        running(
            gateway_process.COMMAND,
            env=gateway_process.environment_for(environment, fd, files=files),
            pass_fds=[fd],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    return int(listener.getsockname()[1])


def _curl(settings: WorkerSettings, port: int) -> int:
    """The same worker through OpenAI's API. The exit code is curl's."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": settings.served_model_names[0], "messages": messages, "max_tokens": 20, "temperature": 0}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["curl", "-sS", "--fail-with-body", url, "-H", "content-type: application/json", "-d", json.dumps(body)]
    print(f"\nThe same through OpenAI's API:\n{shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    print(flush=True)
    return code


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or lines or ["it said nothing"])[-1]
