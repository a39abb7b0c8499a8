"""What all command-line tools share: flags, errors as one line, exit codes, printed commands."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lora.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent


class CommandParser(argparse.ArgumentParser):
    """The parser of `python -m MODULE`. Flags cannot be abbreviated, and an error is one line."""

    def __init__(self, module: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=f"python -m {module}", description=description, epilog=epilog, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        sys.exit(print_error(f"{message}; see --help"))


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
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"  # without the number of the error
        code = print_error(message)
        _discard_stdout()
        return code


def shell_command(module: str, *words: str | Path) -> str:
    """The command `python -m MODULE WORDS`, quoted for a shell.

    The modules can be imported in the checkout alone, so the command changes to it unless it is the current
    folder. Each Path in `words` is printed relative to the checkout if it is inside, otherwise absolute. In
    a process that torchrun started, the command for "train" uses torchrun.
    """
    launched = module == "train" and os.environ.get("WORLD_SIZE", "1") != "1"
    launcher = _torchrun() if launched else [_from_checkout(Path(sys.executable))]
    given = [word if isinstance(word, str) else _from_checkout(word) for word in words]
    command = shlex.join([*launcher, "-m", module, *given])
    return command if Path.cwd() == CHECKOUT else f"cd {shlex.quote(str(CHECKOUT))} && {command}"


def _torchrun() -> list[str]:
    """The torchrun command that started this process, without the program that it runs."""
    size, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    command = [_from_checkout(Path(sys.executable).with_name("torchrun"))]
    if size == local_size:
        return [*command, "--standalone", "--nproc-per-node", str(size)]
    nodes = ["--nnodes", str(size // local_size), "--node-rank", os.environ["GROUP_RANK"]]
    place = ["--master-addr", os.environ["MASTER_ADDR"], "--master-port", os.environ["MASTER_PORT"]]
    return [*command, *nodes, "--nproc-per-node", str(local_size), *place]


def _from_checkout(path: Path) -> str:
    path = path.absolute()  # not resolve(): the Python of a virtual environment is a link
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else str(path)


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
