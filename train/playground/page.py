"""The parts of the playground's page as HTML: results in, text out. All texts are escaped."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from train.anatomy.run import short_name
from train.metrics import Scores
from train.page import page_template
from train.playground.runs import ServedRun
from train.playground.served import Knobs, Served

_REST = 300  # characters that the page shows of a piece, and after those that the model read
# What a browser would not show, or would reorder: control characters, and marks of the writing direction.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)


def visible(text: str) -> Markup:
    """A text as HTML in which control characters are shown by their code, such as U+0007.

    Braces, $ and ` are escaped too, because gradio's HTML component fills in templates.
    """
    shown = _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
    entities = {ord(character): f"&#{ord(character)};" for character in "{}$`\\"}
    return Markup(str(escape(shown)).translate(entities))


_parts: Any = page_template("playground.html", visible=visible).module


def show_head(served: Served) -> str:
    """The title, and what is served."""
    runs = [(run, run.recipe) for run in served.runs.values()]
    return str(_parts.head(runs, served.precision))


def show_api(run: ServedRun, functions: Sequence[Callable[..., Any]]) -> str:
    """The HTTP API: its functions with their parameters, and a command that calls one."""
    described = [
        (function.__name__, ", ".join(inspect.signature(function).parameters), function.__doc__)
        for function in functions
    ]
    return str(_parts.api(described, run.name))


def show_note(text: str) -> str:
    """A sentence about what follows."""
    return str(_parts.note(text))


def show_message(text: str) -> str:
    """A short text, such as an error."""
    return str(_parts.message(text))


def show_probabilities(found: dict[str, Any], text: str, label: str = "") -> str:
    """The result of Served.classify as bars. label: the true class, if it is known."""
    return str(_parts.probabilities(found, len(text), label))


def show_tokens(pieces: list[tuple[int, int, float]], label: str, text: str) -> str:
    """The result of Served.influence as coloured text."""
    most = max((abs(value) for _, _, value in pieces), default=0.0) or 1.0
    shown, last = [], 0
    for _, end, value in pieces:
        # the space between two pieces belongs to the second
        piece = text[last:end]
        piece = piece if len(piece) <= _REST else f"{piece[:_REST]}…"
        shown.append((piece, value / most, value))
        last = end
    rest = text[last : last + _REST]
    if len(text) > last + _REST:
        rest += f" … and {len(text) - last - _REST:,} more characters"
    return str(_parts.tokens(shown, label, rest))


def show_score(what: str, knobs: str, rows: int, scores: Scores) -> str:
    """The accuracy on the rows so far with the knobs in words, and a progress bar."""
    done = int(scores.confusion.sum())
    more = (scores.interval, scores.macro_f1) if done == rows else ()
    return str(_parts.score(what, knobs, done, rows, scores.accuracy, *more))


def show_history(tries: list[dict[str, Any]]) -> str:
    """The accuracies of the settings tried so far, in order, as a curve and a table."""
    return str(_parts.history(tries)) if tries else ""


def show_spectra(run: ServedRun, knobs: Knobs) -> str:
    """The singular values of ΔW by layer, those that the rank keeps marked, and ‖ΔW‖/‖W‖."""
    if run.off:
        return show_message(f"Not shown: {run.off}.")
    rank = run.rank if knobs.rank is None else knobs.rank
    return str(_parts.spectra(run.spectra, run.sizes, rank, short_name))


def show_excitation(tokens: list[str], norms: dict[str, list[float]]) -> str:
    """The result of Served.excitation as a table of colours."""
    return str(_parts.heat(tokens, norms, short_name))


def show_mix(labels: tuple[str, ...], found: dict[str, Any]) -> str:
    """The result of Served.mix as bars."""
    return str(_parts.mixed(labels, found))


def show_merge(name: str, found: dict[str, Any]) -> str:
    """The result of Served.merge_and_unmerge for the run with this name."""
    return str(_parts.merged(name, found))


def describe(run: ServedRun, knobs: Knobs) -> str:
    """Knobs in words, for the history."""
    parts = [run.name, f"scale {knobs.scale:g}"]
    if knobs.rank is not None:
        parts.append(f"rank {knobs.rank}")
    if knobs.layers is not None:
        off = [short_name(name) for name in run.layers if name not in knobs.layers]
        on = [short_name(name) for name in knobs.layers]
        names = f"without {', '.join(off)}" if len(off) <= len(on) else f"only {', '.join(on) or 'the base'}"
        parts.append(names)
    return ", ".join(parts)
