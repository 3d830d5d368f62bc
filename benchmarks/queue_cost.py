"""What the queue costs: a worker's jobs by way of Redis, beside the same work given to its engine directly.

Three ways take turns over slices of work, 64 prompts at once in each:
- the engine alone: `generate_batch` in the worker's process, past the queue (`shortcut_worker.py`);
- the whole path, read elsewhere: client → Redis → worker → stream and result, where every job's stream arrives here,
  but nobody looks at it before the time is taken, as if the clients had machines of their own;
- the whole path: the same, with an `AsyncClient`'s subscription to every job and its result on this machine.

One child computes all of them: same process, prompts, threads. No way finds another's prompts in a prefix cache, which
is off. Each slice of the second and third has its own ratio to the first, measured next to it within seconds; what is
reported is the median of the ratios and how sure it is. Where other processes took more than `--max-others` of a core
during one slice, all three are left out. A way that gives another token than the first ends the run.

    python -m benchmarks.queue_cost [--minutes 7] [--num-prompts 64] [--shorter 2]
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import click
import torch

from benchmarks.paired_engines import describe, take_turns
from benchmarks.queue_ways import CHILD, ROLES, Slice, Ways, open_ways
from benchmarks.report import print_and_keep
from benchmarks.workload import Workload, uniform_workload
from engine.model.devices import resolve_dtype

MODEL = "smollm2-135m"
PROMPT_RANGE, OUTPUT_RANGE = (32, 256), (32, 128)
IDLE_SECONDS = 10.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--minutes", default=7.0, show_default=True)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--shorter", default=2, show_default=True, help="Prompts and outputs are so many times shorter.")
@click.option("--max-others", default=0.25, show_default=True, help="Cores that others may take during a slice.")
@click.argument("worker_arguments", nargs=-1, type=click.UNPROCESSED)
def main(minutes: float, num_prompts: int, shorter: int, max_others: float, worker_arguments: Sequence[str]) -> None:
    ranges = [(low // shorter, high // shorter) for low, high in (PROMPT_RANGE, OUTPUT_RANGE)]
    end = time.monotonic() + 60 * minutes
    with open_ways(MODEL, *worker_arguments) as ways:
        idle_cpu = ways.idle_cpu(IDLE_SECONDS)
        list(take_turns(ways.watched(), [uniform_workload(num_prompts, (8, 16), (4, 8), seed=0)]))  # a warm-up
        groups = list(groups_until(end, ways, num_prompts, *ranges))
    quiet = [group for group in groups if all(slice_.others <= max_others for slice_ in group)]
    if not quiet:
        raise SystemExit(f"others took more than {max_others:g} of a core all the time; see --max-others")
    others = statistics.median(slice_.others for group in quiet for slice_ in group)
    arguments = " ".join(worker_arguments) or str(resolve_dtype("auto", torch.device("cpu"), None))
    notes = [
        f"SmolLM2-135M-Instruct, {arguments}, {num_prompts} prompts U{ranges[0]} → "
        f"U{ranges[1]} tokens at once in a slice, greedy.",
        "Speed and CPU of the child: ratios to the engine alone. CPU beside the child: what parent, Redis and clients "
        "take more than the parent takes there, as a share of all that the engine alone takes. Slice by slice: medians "
        f"with their standard error, in brackets the middle half (of few the range), of {len(quiet)} groups of slices, "
        f"in which other processes took {others:.2f} of a core (median). {len(groups) - len(quiet)} groups more are "
        f"left out: others took more than {max_others:g}.",
        "The last columns are seconds of CPU for 1,000 output tokens, medians.",
        f"Beside the engine alone, too, runs what an idle worker and its Redis do: {100 * idle_cpu:.1f}% of a core.",
    ]
    report(dict(zip(ways.contenders, zip(*quiet, strict=True), strict=True)), notes)


def groups_until(
    end: float, ways: Ways, num_prompts: int, prompt_range: tuple[int, int], output_range: tuple[int, int]
) -> Iterator[list[Slice]]:
    """One slice of each way for the same work, while there is time for more. `end`: monotonic seconds."""
    works: list[Workload] = []

    def next_works() -> Iterator[Workload]:
        longest, begun = 0.0, time.monotonic()
        while begun + longest < end:
            works.append(uniform_workload(num_prompts, prompt_range, output_range, seed=len(works) + 1))
            yield works[-1]
            now = time.monotonic()
            longest, begun = max(longest, now - begun), now

    for group in take_turns(ways.watched(), next_works()):
        check(group, works[-1])
        print(", ".join(map(describe_slice, group)), file=sys.stderr, flush=True)
        yield group


def describe_slice(slice_: Slice) -> str:
    cpu = " ".join(f"{slice_.cpu[role]:.2f}" for role in ROLES)
    return f"{slice_.seconds:.2f} s (CPU {cpu}, others {slice_.others:.2f})"


def check(group: Sequence[Slice], work: Workload) -> None:
    if any(slice_.token_ids != group[0].token_ids for slice_ in group):
        raise SystemExit("the queue changed an output")
    if list(map(len, group[0].token_ids)) != work.max_tokens:
        raise SystemExit("an output ended early")


def report(taken: dict[str, Sequence[Slice]], notes: list[str]) -> None:
    alone = taken["engine alone"]
    rows = []
    for name, own in taken.items():
        pairs = list(zip(alone, own, strict=True))
        speed = statistics.median(slice_.num_tokens / slice_.seconds for slice_ in own)
        ratios = [
            [other.seconds / slice_.seconds for other, slice_ in pairs],
            [slice_.cpu[CHILD] / other.cpu[CHILD] for other, slice_ in pairs],
            [(slice_.cpu_beside_child - other.cpu_beside_child) / other.cpu_seconds for other, slice_ in pairs],
        ]
        cpu = [statistics.median(1000 * slice_.cpu[role] / slice_.num_tokens for slice_ in own) for role in ROLES]
        cells = ["1", "1", "0"] if own is alone else list(map(describe, ratios))
        rows.append([name, f"{speed:.0f}", *cells, *(f"{seconds:.2f}" for seconds in cpu)])
    columns = ["way", "tokens/s", "speed", "CPU of the child", "CPU beside the child", *ROLES]
    print_and_keep("queue_cost", columns, rows, notes)


if __name__ == "__main__":
    main()
