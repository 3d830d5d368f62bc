"""What each stage of the GPU benchmark does, and in which order they come: the most telling first.

A stage finds values of a kind: `check` (name, result), `limits`, `kernel`, `linear` and `profile` (rows of their
tables), `run` (one workload of one contender) and `note`. How a process of its own is made of it is `gpu_stages`'
matter; so that each begins soon, a stage imports what it alone needs: transformers takes seconds.
"""

import platform
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import triton

from benchmarks.cpu_peers import Contender, latencies
from benchmarks.gpu_models import SIZES, SMOKE_SIZE, DeviceLimits, ModelSize, least_seconds, random_model
from benchmarks.gpu_race import OursOnGpu, RaceSettings, first_job_seconds, measure, ours, peer, profile_steps, queued
from benchmarks.gpu_stages import StageJournal
from benchmarks.gpu_timer import Timer
from benchmarks.workload import Workload, uniform_workload
from tests.fakes.fast_interpreter import speed_up_interpreter

OURS = "promptmill"
# Ours with other settings; how many tokens a step has by default it measures itself.
VARIANTS: dict[str, dict[str, object]] = {
    "promptmill, deterministic": {"deterministic": True},
    "promptmill, 8192 a step": {"max_num_tokens": 8192},
}
QUEUED = "promptmill, queued"
_NUM_RUNS = 3  # graphs are captured when their shape is seen for the second time: mostly in the second run
MORE = "more"  # a race's part with all numbers of sequences behind the first


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured."""

    sizes: tuple[str, ...]
    sequences: tuple[int, ...]
    peer_sequences: tuple[int, ...]
    peers: tuple[str, ...]
    seed: int
    root: Path  # of the models
    is_smoke: bool

    @property
    def models(self) -> list[ModelSize]:
        return [SMOKE_SIZE] if self.is_smoke else [SIZES[name] for name in self.sizes]


def stages_of(settings: Settings) -> list[str]:
    """Their names, in order. One is `kind`, or `kind: model`, or `kind: model: contender`, and of a race perhaps its
    second part: what comes first is whether and how fast the engine runs, with the largest number of sequences."""
    first, *others = (size.name for size in settings.models)
    names = ["limits", f"weights: {first}", f"engine checks: {first}", f"race: {first}: {OURS}"]
    has_more = len(settings.sequences) > 1 and not settings.is_smoke
    for name in others:
        names += [f"weights: {name}", f"race: {name}: {OURS}"]
    names.append(f"kernels: {first}")
    names += [f"race: {first}: {OURS}: {MORE}"] if has_more else []
    names += [f"idle: {first}", f"first run: {first}", f"first job: {first}"]
    variants = [] if settings.is_smoke else list(VARIANTS)  # the interpreter takes long for them
    names += [f"race: {first}: {variant}" for variant in variants]
    installed = [peer for peer in settings.peers if peer == "transformers"]
    names += [f"race: {first}: {peer}" for peer in installed]
    names += [f"kernel checks: {name}" for name in (first, *others)]
    names.append(f"tests: {first}")
    names += [f"race: {name}: {OURS}: {MORE}" for name in others if has_more]
    names += [f"{kind}: {name}" for name in others for kind in ("kernels", "idle", "first run", "first job")]
    names += [f"race: {name}: {peer}" for name in others for peer in installed]
    names += [f"race: {name}: {variant}" for name in others for variant in variants]
    for name in (first, *others):
        names += [f"race: {name}: {QUEUED}", f"tiles: {name}", f"linears: {name}"]
    rest = [peer for peer in settings.peers if peer not in installed]
    return names + [f"race: {name}: {peer}" for name in (first, *others) for peer in rest]


class Work:
    """The stages as functions."""

    def __init__(self, settings: Settings, journal: StageJournal) -> None:
        self._settings = settings
        self._journal = journal
        self._device = torch.device("cpu" if settings.is_smoke else "cuda")
        self._timer = Timer(self._device, rounds=1 if settings.is_smoke else 20)
        speed_up_interpreter()
        if settings.is_smoke:
            from tests.fakes.small_tiles import set_small_tiles

            set_small_tiles(setattr)

    def function(self, stage: str) -> Callable[[], None]:
        """What a stage does."""
        kind, *rest = stage.split(": ")
        size = next((size for size in self._settings.models if rest and size.name == rest[0]), None)
        if size is None:
            return self._limits
        functions: dict[str, Callable[..., None]] = {
            "kernel checks": self._kernel_checks,
            "weights": self._weights,
            "engine checks": self._engine_checks,
            "tests": self._tests,
            "kernels": self._kernels,
            "tiles": self._tiles,
            "linears": self._linears,
            "race": self._race,
            "idle": self._idle,
            "first run": self._first_run,
            "first job": self._first_job,
        }
        return partial(functions[kind], stage, size, *rest[1:])

    def _limits(self) -> None:
        from benchmarks.gpu_kernels import measure_limits

        is_smoke = self._settings.is_smoke
        if not is_smoke:
            self._note("limits", f"On {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}.")
        versions = f"torch {torch.__version__}, Triton {triton.__version__}, transformers {version('transformers')}"
        self._note("limits", f"Python {platform.python_version()}, {versions}; checks with seed {self._settings.seed}.")
        # Two buffers of what fits beside others on the device, and no cache holds.
        num_bytes = 1 << 20 if is_smoke else min(1 << 32, torch.cuda.mem_get_info()[0] // 4)
        limits = measure_limits(self._timer, num_bytes=num_bytes, matrix=64 if is_smoke else 8192)
        self._journal.add("limits", kind="limits", **asdict(limits))

    def _kernel_checks(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_checks import check_kernels

        is_first = size is self._settings.models[0]
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if is_first else (torch.bfloat16,)
        for name, result in check_kernels(size, self._device, self._settings.seed, dtypes):
            self._journal.add(stage, kind="check", name=f"{size.name}, {name}", result=result)

    def _engine_checks(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_checks import check_engine

        num_tokens = 9 if self._settings.is_smoke else 300
        for name, result in check_engine(size, self._folder(size), self._device, num_tokens=num_tokens):
            self._journal.add(stage, kind="check", name=f"{size.name}, {name}", result=result)

    def _tests(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_checks import check_tests

        if not self._settings.is_smoke:
            self._journal.add(stage, kind="check", name="tests/gpu", result=check_tests())

    def _weights(self, stage: str, size: ModelSize) -> None:
        self._folder(size)

    def _kernels(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_kernels import time_kernels

        for row in time_kernels(size, self._timer, self._measured_limits(), is_smoke=self._settings.is_smoke):
            self._journal.add(stage, kind="kernel", row=[size.name, *row])

    def _tiles(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_tiles import time_tiles

        for row in time_tiles(size, self._timer, self._measured_limits(), is_smoke=self._settings.is_smoke):
            self._journal.add(stage, kind="kernel", row=[size.name, *row])

    def _linears(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_linears import compare_linears

        for row in compare_linears(size, self._timer, is_smoke=self._settings.is_smoke):
            self._journal.add(stage, kind="linear", row=row)

    def _race(self, stage: str, size: ModelSize, name: str, part: str = "") -> None:
        """Contenders come one after the other: each takes the device's memory."""
        end_id = min(size.vocab, 40_000)
        workloads = self._workloads(name, part, end_id)
        with self._contender(name, self._race_settings(size)) as contender:
            if isinstance(contender, OursOnGpu) and contender.step_tokens is not None:
                self._note(stage, f"{size.name}, {name}: steps of {contender.step_tokens} tokens at most, as measured.")
            measured = measure(contender, workloads, end_id, num_runs=1 if self._settings.is_smoke else _NUM_RUNS)
            for workload, (run, first) in zip(workloads, measured, strict=True):
                ttft, itl = latencies([run])
                self._journal.add(
                    stage,
                    kind="run",
                    model=size.name,
                    load=f"{len(workload.prompts):>3} x {statistics.mean(map(len, workload.prompts)):.0f}",
                    contender=name,
                    seconds=run["seconds"],
                    first_seconds=first,
                    num_tokens=workload.num_output_tokens,
                    least_seconds=least_seconds(size, workload, self._measured_limits()),
                    ttft=ttft,
                    itl=itl,
                )

    def _workloads(self, name: str, part: str, end_id: int) -> list[Workload]:
        """Our engine gets the first number of sequences, then the others as a part of their own; variants the first."""
        settings = self._settings
        counts, lengths = settings.peer_sequences, (100, 1024)
        if settings.is_smoke:
            counts, lengths = (2,), (4, 8)
        elif name.startswith(OURS):
            counts = settings.sequences[1:] if part == MORE else settings.sequences[:1]
        workloads = [uniform_workload(count, lengths, lengths, seed=count, end_id=end_id) for count in counts]
        if not settings.is_smoke and part != MORE:  # for the time to the first token
            workloads.insert(1, uniform_workload(16, (512, 512), (32, 32), seed=0, end_id=end_id))
        return workloads

    @staticmethod
    def _contender(name: str, settings: RaceSettings) -> AbstractContextManager[Contender]:
        if name == OURS or name in VARIANTS:
            return ours(settings, **VARIANTS.get(name, {}))
        return queued(settings) if name == QUEUED else peer(name, settings)

    def _idle(self, stage: str, size: ModelSize) -> None:
        if self._settings.is_smoke:
            return
        profile = profile_steps(self._race_settings(size), 256, min(size.vocab, 40_000))
        self._note(
            stage,
            f"{size.name}: the GPU computed nothing for {profile.idle:.1%} of the time of 50 decode steps of 256 "
            f"sequences: for {profile.by_host:.1%} it waited for the host, the rest lies between one kernel and the "
            f"next. A step took {1e3 * profile.seconds:.2f} ms.",
        )
        for name, count, seconds in profile.kernels:
            row = [size.name, name[:70], f"{count:.3g}", f"{1e6 * seconds:.0f}", f"{seconds / profile.seconds:.1%}"]
            self._journal.add(stage, kind="profile", row=row)

    def _first_run(self, stage: str, size: ModelSize) -> None:
        from benchmarks.gpu_first_run import first_runs

        for text in first_runs(self._race_settings(size), self._workloads(OURS, "", min(size.vocab, 40_000))[0]):
            self._note(stage, f"{size.name}, {text}.")

    def _first_job(self, stage: str, size: ModelSize) -> None:
        seconds = first_job_seconds(self._race_settings(size))
        self._note(stage, f"{size.name}: the first job ended {seconds:.1f} s after the start.")

    def _folder(self, size: ModelSize) -> Path:
        return random_model(size, self._device, self._settings.root)

    def _race_settings(self, size: ModelSize) -> RaceSettings:
        """Raises `SystemExit` without the weights: made here, they would stay in the device's memory as well."""
        if not (self._settings.root / size.name / "tokenizer.json").exists():
            raise SystemExit(f"there are no weights of {size.name}")
        return RaceSettings(self._folder(size), self._device, self._settings.is_smoke)

    def _measured_limits(self) -> DeviceLimits:
        """Raises `SystemExit` if they were not measured: there is nothing to hold a speed against."""
        found = self._journal.findings("limits")
        if not found:
            raise SystemExit("the device's limits are not known")
        return DeviceLimits(found[-1]["bytes_a_second"], found[-1]["flops_a_second"])

    def _note(self, stage: str, text: str) -> None:
        self._journal.add(stage, kind="note", text=text)
