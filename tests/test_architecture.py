"""Who may import what, and who may print: read from the source, and from a process that only searches."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "open_clip", "transformers", "timm"}
MAY_IMPORT_TORCH = ("retrieval/torch_encoder.py", "retrieval/training/", "retrieval/heads/")
MAY_PRINT = "cli/"


def sources() -> list[Path]:
    files = sorted(file for package in ("cli", "retrieval", "indexes") for file in (ROOT / package).rglob("*.py"))
    assert len(files) > 20
    return files


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in a file, in functions and under `if` too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def offences(file: Path) -> list[str]:
    name, tree = file.relative_to(ROOT).as_posix(), ast.parse(file.read_text("utf-8"))
    found = []
    roots = {module.split(".")[0] for module in imports(tree)}
    if roots & HEAVY and not name.startswith(MAY_IMPORT_TORCH):
        found.append(f"{name} imports {sorted(roots & HEAVY)}")
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if not name.startswith(MAY_PRINT) and any(isinstance(call, ast.Name) and call.id == "print" for call in calls):
        found.append(f"{name} prints")
    return found


def test_only_torch_s_own_modules_import_torch_and_only_the_commands_print():
    assert [offence for file in sources() for offence in offences(file)] == []


def test_the_check_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for place in ("retrieval/training", "cli"):
        (tmp_path / place).mkdir(parents=True)
    guilty = {
        "retrieval/a.py": "def f():\n    if True:\n        from torch import nn\n",
        "retrieval/b.py": "import open_clip.transform as t\n",
        "retrieval/c.py": "x = [print(1)]\n",
    }
    innocent = {
        "retrieval/torch_encoder.py": "import torch\n",
        "retrieval/training/d.py": "from torch import nn\n",
        "cli/e.py": "print(1)\n",
        "retrieval/f.py": "'import torch'  # print(1)\nprinter = None\n",
    }
    for name, text in {**guilty, **innocent}.items():
        (tmp_path / name).write_text(text)
    assert all(offences(tmp_path / name) for name in guilty)
    assert not any(offences(tmp_path / name) for name in innocent)


def test_nothing_above_is_imported_from_below():
    below = {"indexes": {"retrieval", "cli"}, "retrieval": {"cli"}}
    for package, forbidden in below.items():
        for file in (ROOT / package).rglob("*.py"):
            roots = {module.split(".")[0] for module in imports(ast.parse(file.read_text("utf-8")))}
            assert not roots & forbidden, file


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after some code."""
    code += "\nimport json, sys; json.dump(sorted({name.split('.')[0] for name in sys.modules}), sys.stdout)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


@pytest.mark.parametrize(
    "modules", ["retrieval.library", "cli.main", "retrieval.evaluation", "retrieval.report", "retrieval.encoders"]
)
def test_what_everybody_imports_loads_no_torch(modules):
    assert not loaded(f"import {modules}") & HEAVY


def test_the_commands_start_without_the_library():
    """`diptych --help` needs neither the models' nor the pictures' packages."""
    assert not loaded("import cli.main") & {"numpy", "onnxruntime", "faiss", "pyarrow", "PIL", "tokenizers", "rich"}


def test_torch_would_be_seen():
    assert "torch" in loaded("import retrieval.training.losses")
