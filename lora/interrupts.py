"""Changes that a signal cannot split: Python runs signal handlers between any two bytecodes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_is_deferring = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context in which Python's signal handlers wait: signals received inside are handled on exit."""
    global _is_deferring
    if _is_deferring or threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        _set_handlers(handlers, lambda number, _frame: received.append(number))
        _is_deferring = True
        yield
    finally:
        _is_deferring = False
        try:
            _set_handlers(handlers)
        finally:
            _set_handlers(handlers)  # again, in case a signal has interrupted the first call
        for number in received:
            signal.raise_signal(number)


def _set_handlers(handlers: dict[signal.Signals, Any], instead: Any = None) -> None:
    for number, handler in handlers.items():
        if callable(handler):  # neither the default action nor ignored
            signal.signal(number, instead or handler)
