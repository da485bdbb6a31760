"""Write docs/cli.md from the commands as they are declared; with --check, fail when it is not what they say now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from cli.main import app

FILE = Path(__file__).parent / "cli.md"
HEAD = """# The command line

Written by `make docs` from the commands themselves; do not edit.

Data goes to standard output, everything else to standard error. Exit codes: 0 fine, 1 a mistake that one line explains,
2 wrong usage, 3 indexing finished but some files could not be read, 130 interrupted (what was finished is kept).
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(
        _section(name, command) for name, command in _commands("diptych", typer.main.get_command(app))
    )


def _commands(name: str, command: Any) -> list[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(name, command)]
    return [pair for key, sub in inner.items() for pair in _commands(f"{name} {key}", sub)]


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *(_metavar(p) for p in arguments), "[OPTIONS]"])
    lines = [f"\n## {name}\n", command.help, "", f"    {usage}", "", "| | | default |", "|---|---|---|"]
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        names = ", ".join(f"`{opt}`" for opt in parameter.opts if opt.startswith("-")) or f"`{_metavar(parameter)}`"
        lines.append(f"| {names} | {parameter.help or ''} | {_default(parameter)} |")
    return "\n".join(lines) + "\n"


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.endswith("...") else f"[{name}]"


def _default(parameter: Any) -> str:
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if shown is None or shown is False or shown == [] or parameter.required:
        return ""
    return f"`{getattr(shown, 'value', shown)}`"


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv:
        FILE.write_text(made, "utf-8")
    elif made != FILE.read_text("utf-8"):
        sys.exit(f"{FILE} is not what the commands say now: run  make docs")
