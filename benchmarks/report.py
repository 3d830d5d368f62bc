"""What every benchmark prints: its command, hardware, commit and a table of medians; kept under `results/`."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def print_and_keep(name: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> None:
    """Print a Markdown table headed by command, hardware and commit, and write it to `results/NAME.md`."""
    text = "\n".join(
        [
            f"# {name}",
            "",
            f"    {command()}",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {hardware()}",
            "",
            *_lines(columns, rows),
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("\n".join(_lines(columns, rows)), end="\n\n")


def _lines(columns: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
        for cells in (columns, ["-" * width for width in widths], *rows)
    ]


def command() -> str:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {module.name}" if module else f"python {sys.argv[0]}"
    return " ".join([start, *map(shlex.quote, sys.argv[1:])])


def commit() -> str:
    """`-dirty` where anything but results differs from it: those are what a benchmark has just written."""
    try:
        name = _git("rev-parse", "--short", "HEAD").stdout.strip()
        is_clean = _git("diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results").returncode == 0
    except OSError:  # a machine with a copy of the sources alone
        return "unknown"
    return name + ("" if is_clean else "-dirty") if name else "unknown"


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)


def hardware() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "").split()
    features = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores of {names[0] if names else platform.processor()} ({', '.join(features) or 'no vector flags'})"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
