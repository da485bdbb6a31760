"""Documentation is executed: docs/python.md block by block, the README's commands, the generated pages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.odd_photos import real_photos

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the examples run: `photos/`, and a pairs file."""
    (tmp_path / "photos").mkdir()
    for photo in real_photos():
        shutil.copyfile(photo, tmp_path / "photos" / photo.name)
    rows = [
        {"image": "photos/chelsea.png", "captions": ["a cat"]},
        {"image": "photos/coffee.png", "captions": ["a cup of coffee"]},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def test_python_examples_run(folder):
    found = blocks("docs/python.md", "python")
    assert len(found) >= 5
    run = subprocess.run([sys.executable, "-c", "\n".join(found)], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "20 added, 0 unreadable"
    assert lines[1].startswith("coffee.png 0.")
    assert lines[2] == "chelsea.png 3 of 4"
    assert lines[3] == "same-file ['coffee again.png', 'coffee.png']"
    assert lines[4] == "1.0 1.0 (1.0, 1.0)"
    assert lines[5] == "['chelsea.png', 'coffee.png']"


def test_readme_commands_run(folder):
    """The first block of the README, with its folder standing for ~/Pictures; installing is what made this run."""
    (block, *_) = blocks("README.md", "sh")
    commands = [line for line in block.splitlines() if line.startswith("diptych ")]
    assert [command.split()[1] for command in commands] == ["index", "search"]
    for command in commands:
        line = command.replace("~/Pictures", str(folder / "photos")).partition("#")[0]
        run = subprocess.run(
            line.replace("diptych", f'{sys.executable} -c "from cli.main import run; run()"', 1),
            shell=True,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, (line, run.stderr)
    assert len(run.stdout.splitlines()) == 10


def test_the_page_of_import_and_export_runs(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (folder / "bin").mkdir()
    command = folder / "bin" / "diptych"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from cli.main import run; run()" "$@"\n')
    command.chmod(0o755)
    env["PATH"] = f"{command.parent}{os.pathsep}{env['PATH']}"
    script = "\n".join(["set -e", *blocks("docs/exchange.md", "sh")])
    run = subprocess.run(["sh", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nothing new; 20 pictures searchable" in run.stderr
    assert "imported 2 pictures into" in run.stderr
    assert run.stdout.splitlines()[0].endswith("chelsea.png")
    (block,) = blocks("docs/exchange.md", "python")
    run = subprocess.run([sys.executable, "-c", block], cwd=folder, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "20 builtin"), run.stderr


def test_every_command_is_in_the_manual():
    manual = (ROOT / "docs" / "cli.md").read_text("utf-8")
    from cli.main import app

    commands = typer.main.get_command(app).commands
    names = [name for name in commands if name != "models"]
    names += [f"models {name}" for name in commands["models"].commands]
    assert len(names) > 10
    assert [name for name in names if f"## diptych {name}\n" not in manual] == []


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), (page, link)
