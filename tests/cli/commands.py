"""Running `diptych` in tests: in a process of its own, and what to expect of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

COMMAND = "from cli.main import run; run()"


def diptych(*arguments, cwd=None, env=None, **options):
    """Run the command; nothing is known of imported models unless ``env`` says where they are."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "XDG_DATA_HOME": "/nonexistent", "COLUMNS": "200", **(env or {})},
        **{"capture_output": True, "text": True, "errors": "surrogateescape", **options},
    )


def result(run, code=0):
    """The JSON that it printed."""
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr
    return json.loads(run.stdout)


def complaint(run, code=1):
    """The one line of a mistake."""
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    return lines[0]
