"""Our engine on a GPU: first whether it computes rightly, then how fast, beside the device's limits and its peers.

Checks every kernel against its twin, the engine against transformers, and rows bit for bit in other batches. Then times
kernels, the products that `deterministic` could use, and the engine on U(100,1024) → U(100,1024) tokens with random
weights, alone, behind the queue, and its peers where they are installed. Every stage is a process of its own, and what
it finds is kept in a journal as it comes: a stage that fails or hangs costs its own time alone, and with `--minutes`
the whole is done in several calls, each of which goes on where the last one ended and prints all that is known of its
device: another device begins anew in the same journal.
`--smoke` runs all of it in small on a CPU, under Triton's interpreter, and keeps no result.

    python -m benchmarks.gpu [--minutes 9] [--sizes Qwen3-0.6B,Qwen3-8B] [--sequences 1,64,256] [--peers transformers]
"""

import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch

from benchmarks.gpu_models import MODELS, SIZES
from benchmarks.gpu_report import report
from benchmarks.gpu_stages import STAGE_SECONDS, StageJournal, device_name, run_apart, run_here
from benchmarks.gpu_work import Settings, Work, stages_of

JOURNAL = MODELS.parent / "gpu.jsonl"
PEERS = "transformers,vllm,sglang"


@click.command()
@click.option("--sizes", default=",".join(SIZES), show_default=True, help="Models, by comma.")
@click.option(
    "--sequences",
    default="256,64,1,16,512",
    show_default=True,
    help="Prompts of a run, by comma; variants get the first.",
)
@click.option("--peer-sequences", default="256", show_default=True, help="The same of peers, which take longer.")
@click.option("--peers", default=PEERS, show_default=True, help="Which peers, by comma.")
@click.option("--seed", type=int, help="Of the checks' inputs; default: another one each time.")
@click.option("--minutes", type=float, help="End after so many; call again to go on.")
@click.option("--stage-seconds", default=STAGE_SECONDS, show_default=True, help="Limit of one stage.")
@click.option("--journal", type=click.Path(path_type=Path, dir_okay=False), default=JOURNAL, show_default=True)
@click.option("--again", is_flag=True, help="Run what failed in an earlier call once more.")
@click.option("--fresh", is_flag=True, help="Forget what earlier calls found.")
@click.option("--stage", help="Run this stage alone, in this process, and print nothing else.")
@click.option(
    "--smoke", is_flag=True, help="Everything in small on a CPU, under Triton's interpreter; keeps no result."
)
def main(
    sizes: str,
    sequences: str,
    peer_sequences: str,
    peers: str,
    seed: int | None,
    minutes: float | None,
    stage_seconds: int,
    journal: Path,
    again: bool,
    fresh: bool,
    stage: str | None,
    smoke: bool,
) -> None:
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --smoke runs on a CPU")
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    seed = int.from_bytes(os.urandom(3)) if seed is None else seed
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory())) if smoke else MODELS
        settings = Settings(
            sizes=tuple(filter(None, sizes.split(","))),
            sequences=tuple(map(int, sequences.split(","))),
            peer_sequences=tuple(map(int, peer_sequences.split(","))),
            peers=tuple(filter(None, peers.split(","))),
            seed=seed,
            root=root,
            is_smoke=smoke,
        )
        if fresh and stage is None:
            journal.unlink(missing_ok=True)
        kept = StageJournal(None) if smoke else StageJournal(journal, device_name())
        if smoke or stage is not None:
            work = Work(settings, kept)
            for name in stages_of(settings) if stage is None else [stage]:
                run_here(name, work.function(name), kept)
        else:
            run_all(
                [name for name in stages_of(settings) if not kept.is_settled(name, again)],
                settings,
                kept,
                until,
                stage_seconds,
            )
    if stage is None:
        report(settings, kept)


def run_all(stages: list[str], settings: Settings, journal: StageJournal, until: float, stage_seconds: float) -> None:
    """One after the other, for as long as there is time."""
    arguments = [*sys.argv[1:], "--seed", str(settings.seed)]
    for name in stages:
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--stage", name]
        print(f"{name}: {shlex.join(command)}", file=sys.stderr, flush=True)
        if not run_apart(name, command, journal, until, stage_seconds):
            return


if __name__ == "__main__":
    main()
