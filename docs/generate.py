"""Write docs/cli.md from the commands' own help; with --check, fail when it is not what they say now."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent / "cli.md"
COMMANDS = ("", "index", "search", "encode", "evaluate", "train", "info", "models", "models list", "models import", "models export")
HEAD = """# The command line

Written by `make docs` from the commands' own help; do not edit.

Data goes to standard output, everything else to standard error. Exit codes: 0 fine, 1 a mistake that one line explains,
2 wrong usage, 3 indexing finished but some files could not be read, 130 interrupted (what was finished is kept).
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in COMMANDS:
        arguments = [*command.split(), "--help"]
        run = subprocess.run(
            [sys.executable, "-c", "from cli.main import run; run()", *arguments],
            env={**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb", "TYPER_USE_RICH": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        text = re.sub(r"[ \t]+$", "", run.stdout, flags=re.MULTILINE).strip()
        text = text.replace("Usage: -c", "Usage: diptych").replace("Usage: diptych diptych", "Usage: diptych")
        parts.append(f"## {' '.join(['diptych', *command.split()])}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv:
        FILE.write_text(made, "utf-8")
    elif made != FILE.read_text("utf-8"):
        sys.exit(f"{FILE} is not what the commands say now: run  make docs")
