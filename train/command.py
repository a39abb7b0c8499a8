"""What all command-line tools share: errors as one line, exit codes, closed pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lora.errors import UserError


def run_command(command: Callable[[], int | None]) -> int:
    """Runs `command` and returns its exit code, 0 if it returns None.

    A UserError or OSError is printed to stderr as one line, and the exit code is 2. Ctrl-C gives 130. It is
    not an error if the reader of stdout has gone, as with `| head`.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return 0
    except (UserError, OSError) as error:
        return print_error(str(error))


def print_error(message: str) -> int:
    """Prints an error to stderr, with the rank of a process started by torchrun. Returns exit code 2."""
    where = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    print(f"error{where}: {message}", file=sys.stderr)
    return 2
