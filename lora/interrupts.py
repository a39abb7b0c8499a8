"""Ctrl-C at any moment: changes that neither a signal nor another thread can split.

Python runs signal handlers between bytecodes of the main thread, so a KeyboardInterrupt can occur inside
any function of the library, in the middle of a change. Two threads that merge one layer at the same time
would copy the merged weight as W.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_is_deferring = False
_changing = threading.RLock()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context in which Python's signal handlers wait: signals received inside are handled on exit.

    One thread at a time can be inside, any number of times.
    """
    global _is_deferring
    if threading.current_thread() is not threading.main_thread():
        with _changing:
            yield  # handlers run in the main thread only
        return
    if _is_deferring:
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        _set_handlers(handlers, lambda number, _frame: received.append(number))
        _is_deferring = True
        with _changing:
            yield
    finally:
        _is_deferring = False
        try:
            _set_handlers(handlers)
        finally:
            _set_handlers(handlers)  # again, in case a signal has interrupted the first call
        with ExitStack() as stack:  # all of them, also after one whose handler has raised
            for number in reversed(received):
                stack.callback(signal.raise_signal, number)


def _set_handlers(handlers: dict[signal.Signals, Any], instead: Any = None) -> None:
    for number, handler in handlers.items():
        if callable(handler):  # neither the default action nor ignored
            signal.signal(number, instead or handler)
