"""python -m train: trains by a recipe and writes a run's folder. The command itself is in cli.py."""

from __future__ import annotations

import os
import signal
import sys


def _stop(number: int, _frame: object) -> None:
    """Stops at once: outside of training there is no step to finish, and files are written atomically."""
    os.write(2, b"\nstopped outside of training; no file is half-written, and --resume continues a run\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)  # before the imports, which take seconds
    from train.cli import main

    sys.exit(main())
