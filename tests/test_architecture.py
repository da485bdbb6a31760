"""Who may import what, and who may print: read from the source, and from a process that only searches."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import typer

from indexes.store import ModelRef, Row, Store
from retrieval.encoders import load_encoder

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


# ---- a search that is a process of its own ---------------------------------------------------------------------------

OWN = {
    *("cli", "cli.main", "cli.app", "cli.render", "cli.indexing"),
    *("retrieval", "retrieval.errors", "retrieval.library", "retrieval.origin", "retrieval.encoders"),
    *("retrieval.bundle", "retrieval.onnx_encoder", "retrieval.sessions", "retrieval.preprocessing"),
    *("indexes", "indexes.errors", "indexes.runtime", "indexes.manifest", "indexes.columns", "indexes.vectors"),
    *("indexes.segments", "indexes.snapshot", "indexes.store"),
}
NEEDED = {"typer", "numpy", "onnxruntime", "pyarrow", "pyarrow.parquet", "tokenizers"}
NEEDLESS = {
    *("torch", "open_clip", "pandas", "scipy", "sklearn", "matplotlib", "transformers"),
    *("rich", "filelock", "huggingface_hub", "threadpoolctl", "pi_heif"),
    *("pyarrow.compute", "pyarrow.dataset", "pyarrow.csv", "pyarrow.json"),
    *("asyncio", "concurrent.futures", "multiprocessing", "tarfile"),
    *("PIL", "cykooz_resizer"),
}


SPY = """
import sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        print("asked for", name, file=sys.stderr)
sys.meta_path.insert(0, Spy())
from cli.main import run
run()
"""


def imported(folder: Path, *arguments: str) -> set[str]:
    """Every module that a command asks for, those that are not there too (an optional one may be, elsewhere)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SPY, *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert run.returncode == 0, run.stderr
    return {line.removeprefix("asked for ") for line in run.stderr.splitlines() if line.startswith("asked for ")}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with an index of three rows and a deleted one, as if the built-in model had made them."""
    folder, model = tmp_path_factory.mktemp("photos"), load_encoder()
    made = Store.create(folder / ".diptych", None, ModelRef("builtin", model.fingerprint, model.dim))
    with made.write() as writer:
        for i in range(4):
            row = Row(path=f"{i}.jpg", size=1, mtime_ns=1, hash=str(i), width=4, height=3)
            writer.add(row, np.eye(4, model.dim, dtype=np.float32)[i])
        writer.commit()
        writer.remove(0)
    return folder


@pytest.mark.parametrize("how", [[], ["-f"], ["--json"]])
def test_a_search_on_a_pipe_imports_what_its_answer_needs(store, how):
    found = imported(store, "search", "-n", "a cat", *how)
    assert {name for name in found if name.split(".")[0] in {"cli", "retrieval", "indexes"}} == OWN
    assert found >= NEEDED
    assert found & (NEEDLESS | {"faiss"}) == set()  # search is exact here


def test_a_search_through_faiss_imports_nothing_else_for_it(tmp_path):
    model, rows = load_encoder(), 2000
    made = Store.create(tmp_path / ".diptych", None, ModelRef("builtin", model.fingerprint, model.dim))
    with made.write() as writer:
        names = [f"{i}.jpg" for i in range(rows)]
        facts = pa.table({"path": names, "size": [1] * rows, "mtime_ns": [1] * rows, "hash": names})
        writer.add_many(facts, np.random.default_rng(0).standard_normal((rows, model.dim), dtype=np.float32))
    made.rebuild_index("Flat")
    found = imported(tmp_path, "search", "-n", "a cat")
    assert {name for name in found if name.split(".")[0] in {"cli", "retrieval", "indexes"}} == OWN
    assert "faiss" in found
    assert found & NEEDLESS == set()


def test_looking_for_new_photos_first_opens_no_picture(store):
    found = imported(store, "search", "a cat")
    assert found & {"torch", "rich", "PIL.JpegImagePlugin", "tarfile", "huggingface_hub"} == set()


def test_info_opens_no_model_and_no_picture(store):
    found = imported(store, "info")
    assert found & (NEEDLESS | {"onnxruntime", "tokenizers", "faiss"}) == set()


def test_a_command_that_reads_no_index_loads_no_other_command(tmp_path):
    found = imported(tmp_path, "models", "list")
    assert found & {"cli.indexing", "cli.training", "cli.measuring", "onnxruntime", "faiss"} == set()
    assert "retrieval.encoders" in found


def test_every_command_that_a_module_declares_can_be_called():
    import cli
    from cli.app import app

    for module in pkgutil.iter_modules(cli.__path__):
        importlib.import_module(f"cli.{module.name}")
    declared = {info.name or info.callback.__name__ for info in app.registered_commands}
    commands = typer.main.get_command(app).commands
    assert set(commands) == declared | {"caption", "classify", "imagine", "models"}
    assert [name for name, command in commands.items() if command.name != name] == []


def test_needless_modules_would_be_seen(store):
    assert "filelock" in imported(store, "index", ".", "--json")  # as the rows' files are gone
    assert "pyarrow.compute" in imported(store, "search", "-n", "a cat", "--width", "3..")
