"""The command line: parse, call, print. Everything that is known about pictures and vectors lies below."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from cli import render
from cli.app import INTERRUPTED, USER_ERROR, app
from indexes.errors import DiptychError
from indexes.runtime import let_blas_sleep

__all__ = ["app", "main", "run"]

# Taking Python and its libraries apart takes a fifth of a search's time. Where nothing was begun that an exit would end
# (no workers, no threads, nothing unwritten), the system does it at once.
_READING = (["search"], ["info"])


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
        app()
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
