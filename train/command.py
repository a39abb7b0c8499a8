"""What all command-line tools share: errors as one line, exit codes, closed pipes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lora.errors import UserError


def run_command(command: Callable[[], int | None]) -> int:
    """Runs `command` and returns its exit code, 0 if it returns None.

    A UserError or OSError is printed to stderr as one line, and the exit code is 2. Ctrl-C gives 130. It is
    not an error if the reader of stdout has gone, as with `| head`. Characters that stdout cannot encode are
    escaped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_stdout()
        return 0
    except (UserError, OSError) as error:
        code = print_error(str(error))
        _discard_stdout()
        return code


def python() -> str:
    """The running Python as a user would type it: a relative path if it is in the current folder."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def print_error(message: str) -> int:
    """Prints an error to stderr, with the rank of a process started by torchrun. Returns exit code 2."""
    where = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    with contextlib.suppress(OSError):
        print(f"error{where}: {message}", file=sys.stderr, flush=True)
    return 2


def _discard_stdout() -> None:
    """Makes the flush at the exit of Python succeed, where writing to stdout has failed."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
