"""Check an environment into which only the wheel was installed: its size, and an index and a search without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST_DISTRIBUTIONS, MOST_MEGABYTES = 40, 600


def main(environment: Path) -> None:
    from benchmarks.demo import shipped_photos

    python, diptych = environment / "bin" / "python", environment / "bin" / "diptych"
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    names = sorted(row["name"] for row in listed if row["name"] not in ("pip", "setuptools"))
    packages = environment / "lib"
    megabytes = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file() and "__pycache__" not in f.parts) / 1e6
    print(f"core install: {len(names)} distributions, {megabytes:.0f} MB")
    assert "torch" not in names
    assert len(names) <= MOST_DISTRIBUTIONS, names
    assert megabytes <= MOST_MEGABYTES

    with tempfile.TemporaryDirectory() as scratch:
        photos = shipped_photos(Path(scratch) / "photos")
        report = json.loads(run(diptych, "index", photos, "--json"))
        assert (report["added"], report["failures"]) == (20, []), report
        found = json.loads(run(diptych, "search", "a cat", "--json", cwd=photos))
        assert Path(found[0]["path"]).name == "chelsea.png", found
        assert json.loads(run(diptych, "index", photos, "--json"))["embedded"] == 0
    print("index and search work without torch")


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command outside the repository, so that only what is installed is found."""
    done = subprocess.run([str(part) for part in command], cwd=cwd or "/", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]).absolute())
