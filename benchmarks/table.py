"""benchmarks/README.md: one section for each script, written by the script itself."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from indexes.runtime import processor_flags

README = Path(__file__).parent / "README.md"
HEAD = """# Benchmarks

Each section is written by the script it names. Machines differ: compare ratios.
"""


def write_section(title: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Put a section with a table into the README, in place of the one with the same title; print it too."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    table = "\n".join(lines)
    page = README.read_text("utf-8") if README.exists() else HEAD
    page = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", page, flags=re.DOTALL)
    README.write_text(f"{page.rstrip()}\n\n## {title}\n\n{text}\n\n{table}\n", "utf-8")
    print(table)


def machine() -> str:
    """Processor, and the flags that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    flags = [flag for flag in wanted if flag in processor_flags()]
    cores = f"{os.cpu_count()} cores ({' '.join(flags)})"
    return f"{fields.get('model name', '?')}, {cores}, Python {platform.python_version()}"
