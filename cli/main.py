"""The command line: parse, call, print. Everything that is known about pictures and vectors lies below."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import click

from cli import render
from cli.app import INTERRUPTED, USER_ERROR
from indexes.errors import DiptychError
from indexes.runtime import let_blas_sleep

__all__ = ["app", "main", "run"]

# In the order in which `diptych --help` lists them, each in the module of this package that declares it.
_COMMANDS = {
    "index": "indexing",
    "search": "indexing",
    "info": "indexing",
    "dedupe": "keeping",
    "encode": "measuring",
    "evaluate": "measuring",
    "export": "porting",
    "import": "porting",
    "train": "training",
    "models": "models",
}
# Taking Python and its libraries apart takes a fifth of a search's time. Where nothing was begun that an exit would end
# (no workers, no threads, nothing unwritten), the system does it at once.
_READING = (["search"], ["info"])


class _Commands(click.Group):
    """Commands by the modules that declare them: what is not called is not imported."""

    def __init__(self, modules: Mapping[str, str], **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """See click."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """See click."""
        if cmd_name not in self._modules:
            return None
        module = importlib.import_module(f"cli.{self._modules[cmd_name]}")
        commands = (value for value in vars(module).values() if isinstance(value, click.Command))
        return next(command for command in commands if command.name == cmd_name)


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"diptych {version('diptych')}")
        ctx.exit()


app = _Commands(
    _COMMANDS,
    name="diptych",
    help="Make a folder of photos searchable by sentence, measure the retriever, train a better one.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version and exit.",
        )
    ],
)


def run() -> NoReturn:
    """Entry point of the process `diptych`."""
    let_blas_sleep()
    try:
        main()
    except SystemExit as leaving:
        if sys.argv[1:2] in _READING and (leaving.code is None or isinstance(leaving.code, int)):
            sys.stderr.flush()
            os._exit(leaving.code or 0)
        raise


def main() -> NoReturn:
    """The command in whatever process this is: the exit codes, and the one plain line of every mistake."""
    # Closed by the caller (>&-): what is opened next would take its place and get what is printed.
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    code: object = 0
    try:
        code = app.main(prog_name="diptych", standalone_mode=False)
    except click.ClickException as error:  # wrong usage
        error.show()
        code = error.exit_code
    except click.Abort:  # what click makes of Ctrl-C
        code = INTERRUPTED
    except DiptychError as error:
        code = _complain(str(error))
    except OSError as error:  # of the place it runs in: a full disk, a name too long, a folder that may not be entered
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        code = _complain(where + (error.strerror or str(error)))
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        code = _complain("a path begins with ~ and the name of a user who is not known here")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    if code == INTERRUPTED:
        render.note("interrupted; everything finished so far is kept")
    sys.exit(_flushed(code))  # type: ignore[arg-type]


def _flushed(code: object) -> object:
    """Send off what is still buffered; else Python would do it after us, and complain in its own words."""
    if sys.__stdout__ is None:
        return code
    try:
        sys.__stdout__.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader, `head` for one, has seen enough
            return _complain(error.strerror or str(error))
    return code


def _complain(reason: str) -> int:
    render.note(f"diptych: {reason}")
    return USER_ERROR
