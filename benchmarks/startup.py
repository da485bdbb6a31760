"""CPU seconds of a new process: `diptych --help`, and a search over the demo's photos. Writes benchmarks/README.md.

.venv/bin/python -m benchmarks.startup
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.demo import shipped_photos

DIPTYCH = "from cli.main import run; run()"
RUNS = 7
HELP_BAR = 0.3  # CPU seconds
README = Path(__file__).parent / "README.md"


def cpu_seconds(code: str, arguments: list[str], cwd: Path) -> float:
    """Median user + system time over a few runs, after one to warm the disk cache."""
    command = [sys.executable, "-c", code, *arguments]
    times = []
    for _ in range(RUNS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, env={**os.environ, "NO_COLOR": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(times[1:])


def processor() -> str:
    """Model and the flags that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', '?')}, {os.cpu_count()} cores ({' '.join(flags)})"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        photos = shipped_photos(Path(scratch) / "photos")
        subprocess.run([sys.executable, "-c", DIPTYCH, "index", str(photos)], check=True)
        rows = [
            ("python -c pass", cpu_seconds("pass", [], photos), ""),
            ("diptych --help", cpu_seconds(DIPTYCH, ["--help"], photos), f"under {HELP_BAR}"),
            ("diptych search, 20 photos, built-in model", cpu_seconds(DIPTYCH, ["search", "a cat"], photos), ""),
        ]
    table = "\n".join(f"| `{name}` | {seconds:.2f} | {bar} |" for name, seconds, bar in rows)
    README.write_text(
        "# Benchmarks\n\nWritten by the scripts in this folder; each says in its first lines how to run it. Machines "
        "differ: compare ratios.\n\n## Start-up\n\n"
        f"`python -m benchmarks.startup` on {processor()}, Python {platform.python_version()}; CPU seconds, user and "
        f"system, median of {RUNS} new processes.\n\n| process | CPU s | bar |\n|---|---|---|\n{table}\n",
        "utf-8",
    )
    print(table)
    if rows[1][1] > HELP_BAR:
        sys.exit(f"diptych --help takes {rows[1][1]:.2f} s of CPU, more than {HELP_BAR}")


if __name__ == "__main__":
    main()
