"""CPU seconds of a new process: `diptych --help`, and a search over the demo's photos.

.venv/bin/python -m benchmarks.startup
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.demo import shipped_photos
from benchmarks.table import machine, write_section

DIPTYCH = "from cli.main import run; run()"
RUNS = 7
HELP_BAR = 0.3  # CPU seconds


def cpu_seconds(code: str, arguments: list[str], cwd: Path) -> float:
    """Median user + system time over a few runs, after one to warm the disk cache."""
    times = []
    for _ in range(RUNS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(times[1:])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        photos = shipped_photos(Path(scratch) / "photos")
        subprocess.run([sys.executable, "-c", DIPTYCH, "index", str(photos)], check=True)
        rows = [
            ("`python -c pass`", cpu_seconds("pass", [], photos), ""),
            ("`diptych --help`", cpu_seconds(DIPTYCH, ["--help"], photos), f"under {HELP_BAR}"),
            ("`diptych search`, 20 photos, built-in model", cpu_seconds(DIPTYCH, ["search", "a cat"], photos), ""),
        ]
    write_section(
        "Start-up",
        f"`python -m benchmarks.startup` on {machine()}: CPU seconds, user and system, median of {RUNS} new processes.",
        ("process", "CPU s", "bar"),
        [(name, f"{seconds:.2f}", bar) for name, seconds, bar in rows],
    )
    if rows[1][1] > HELP_BAR:
        sys.exit(f"diptych --help takes {rows[1][1]:.2f} s of CPU, more than {HELP_BAR}")


if __name__ == "__main__":
    main()
