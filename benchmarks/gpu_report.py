"""The tables of the GPU benchmark, made of whatever its stages have found so far."""

from benchmarks.gpu_stages import Finding, StageJournal
from benchmarks.gpu_work import OURS, Settings, stages_of
from benchmarks.report import print_and_keep, print_table

KERNEL_COLUMNS = ["model", "kernel", "case", "µs", "rate", "share of limit"]
PROFILE_COLUMNS = ["model", "kernel", "a step", "µs a step", "share of a decode step"]
LINEAR_COLUMNS = ["model", "layer", "product", "rows with other bits", "time / the library's, by rows"]
ENGINE_COLUMNS = [
    "model",
    "sequences",
    "contender",
    "output tokens/s",
    "share of limit",
    "ours / its",
    "TTFT s",
    "ITL ms",
    "first run",
]


def report(settings: Settings, journal: StageJournal) -> None:
    """Print all tables, and keep the engines'. Raises `SystemExit` if a check failed or none was made."""
    checks = journal.findings("check")
    kernels = [finding["row"] for finding in journal.findings("kernel")]
    linears = [finding["row"] for finding in journal.findings("linear")]
    print_table(["check", "result"], [[check["name"], check["result"]] for check in checks])
    print_table(KERNEL_COLUMNS, kernels)
    print_table(LINEAR_COLUMNS, linears)
    print_table(PROFILE_COLUMNS, [finding["row"] for finding in journal.findings("profile")])
    rows = engine_rows(journal.findings("run"))
    notes = [finding["text"] for finding in journal.findings("note")]
    for limits in journal.findings("limits"):
        bytes_a_second, flops = limits["bytes_a_second"] / 1e12, limits["flops_a_second"] / 1e12
        notes.append(f"Limits: {bytes_a_second:.3g} TB/s copied, {flops:.3g} TFLOP/s.")
    notes.append(
        "Every workload was run three times by every contender, the third time is told: in the first one kernels are "
        "compiled, in the second one most graphs captured. A run of more than a minute was the last of its workload. "
        "The last column has the first run's tokens/s."
    )
    notes += [f"{stage}: {journal.outcomes.get(stage, 'not run')}" for stage in missing(settings, journal)]
    failed = [check["name"] for check in checks if check["result"] != "ok"]
    if settings.is_smoke or failed or not checks:
        print_table(ENGINE_COLUMNS, rows)
        print("\n".join(notes))
        if settings.is_smoke:
            print("smoke run: no result is kept")
    else:
        notes += [f"{' '.join(row[:3])}: {row[3]} µs, {row[4]}, {row[5]} of the limit." for row in kernels]
        notes += [f"{row[0]} {row[1]}, {row[2]}: other bits with rows {row[3]}; time {row[4]}." for row in linears]
        print_and_keep("gpu", ENGINE_COLUMNS, rows, notes)
    if failed or not checks:
        raise SystemExit(f"checks failed: {', '.join(failed)}" if failed else "no check was made")


def missing(settings: Settings, journal: StageJournal) -> list[str]:
    """The stages that are not done."""
    return [stage for stage in stages_of(settings) if journal.outcomes.get(stage) != "done"]


def engine_rows(runs: list[Finding]) -> list[list[str]]:
    """Rows of `ENGINE_COLUMNS`, the contenders of a workload together, ours first."""
    ours = {(run["model"], run["load"]): run["seconds"] for run in runs if run["contender"] == OURS}
    places = {key: place for place, key in enumerate(dict.fromkeys((run["model"], run["load"]) for run in runs))}
    rows = []
    for run in sorted(runs, key=lambda run: places[run["model"], run["load"]]):
        own = ours.get((run["model"], run["load"]))
        rows.append(
            [
                run["model"],
                run["load"],
                run["contender"],
                f"{run['num_tokens'] / run['seconds']:.0f}",
                f"{run['least_seconds'] / run['seconds']:.0%}",
                "-" if own is None else f"{run['seconds'] / own:.2f}",
                run["ttft"],
                run["itl"],
                f"{run['num_tokens'] / run['first_seconds']:.0f}",
            ]
        )
    return rows
