"""SIGINT and SIGTERM during training: finish the step, write a checkpoint, stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REPEAT_SECONDS = 5


class InterruptedRunError(Exception):
    """A signal stopped the run after a step and a checkpoint. `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def deferred_signals(processes: int) -> Iterator[list[int]]:
    """Context in which the first SIGINT or SIGTERM is appended to the list; a second one acts at once.

    With several processes a second signal within seconds is ignored, because torchrun forwards a Ctrl-C that
    the processes have received already.
    """
    received: list[int] = []
    first_at = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
        elif processes == 1 or time.monotonic() - first_at > _REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
