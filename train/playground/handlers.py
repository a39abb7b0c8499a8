"""What the controls of the playground's page do: their values in, parts of the page out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from train.anatomy.run import position, short_name
from train.playground import page
from train.playground.runs import ServedRun
from train.playground.served import InputError, Knobs, Served
from train.tables import excerpt

PRESETS = ("the adapter", "rank 1", "only the top block", "opposite", "base")
_PROGRESS_SECONDS = 0.5
_MOST_TRIES = 200  # settings that a visitor's curve shows


def _shown(function: Callable[..., str]) -> Callable[..., str]:
    """The method with the message of an InputError as its result."""

    @functools.wraps(function)
    def call(*values: Any) -> str:
        try:
            return function(*values)
        except InputError as error:
            return page.show_message(str(error))

    return call


class Handlers:
    """The functions that gradio calls. knobs: the run's name, scale, rank, and the layers that are on."""

    def __init__(self, served: Served):
        self.served = served

    @_shown
    def classify(self, text: str, *knobs: Any) -> str:
        """The class probabilities of the text."""
        run, changed = self._turned(*knobs)
        label = next((example.label for example in run.examples if example.text == text), "")
        return page.show_probabilities(self.served.classify(run.name, text, changed), text, label)

    @_shown
    def explain(self, text: str, *knobs: Any) -> str:
        """The text, coloured by influence."""
        run, changed = self._turned(*knobs)
        return page.show_tokens(*self.served.influence(run.name, text, changed), text)

    def sample(self, session: dict[str, Any], *knobs: Any) -> Iterator[tuple[Any, Any]]:
        """The accuracy on the sample so far; at the end also the curve of what this visitor has tried.

        session: of the visitor. It is changed in place, so that an older computation sees a newer one, and
        stops. Moving several controls at once asks several times for the same, which is computed once.
        """
        run, changed = self._turned(*knobs)
        asked = [run.name, changed]
        if session.get("asked") == asked:
            yield gr.skip(), gr.skip()
            return
        session["asked"] = asked
        words = page.describe(run, changed)
        shown = 0.0
        try:
            for rows, scores in self.served.score(run.name, changed):
                if session["asked"] is not asked:  # it may be equal to this one
                    return
                if time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    yield page.show_score("validation articles", words, rows, scores), gr.skip()
        except BaseException:
            session["asked"] = None  # so that the same can be asked again
            raise
        tries = session.setdefault("tries", [])
        tries.append({"knobs": words, "accuracy": scores.accuracy})
        del tries[:-_MOST_TRIES]
        yield page.show_score("validation articles", words, rows, scores), page.show_history(tries)

    def score_test(self, *knobs: Any) -> Iterator[str]:
        """The scores on the test part so far."""
        run, changed = self._turned(*knobs)
        words = page.describe(run, changed)
        for rows, scores in self.served.score(run.name, changed, "test"):
            yield page.show_score("test articles", words, rows, scores)

    def look_inside(self, *knobs: Any) -> str:
        """The spectra and sizes of ΔW."""
        return page.show_spectra(*self._turned(*knobs))

    @_shown
    def excite(self, text: str, name: str) -> str:
        """‖A·x‖ by layer and token."""
        return page.show_excitation(*self.served.excitation(name, text))

    @_shown
    def compare(self, text: str, *weights: float) -> str:
        """The class probabilities by each run and by the weighted sum."""
        by_name = zip(self.served.runs.values(), weights, strict=True)
        found = self.served.mix(text, {run.name: weight for run, weight in by_name if not run.off})
        return page.show_mix(self.served.labels, found)

    @_shown
    def merge_now(self, text: str, name: str) -> str:
        """What merging and unmerging did."""
        return page.show_merge(name, self.served.merge_and_unmerge(name, text))

    def choose(self, name: str) -> tuple[Any, ...]:
        """The controls for another run: scale, rank, layers and examples."""
        run = self.served.runs[name]
        return (
            gr.Slider(**scale_settings(run)),
            gr.Slider(**rank_settings(self.served, run)),
            gr.CheckboxGroup(**layer_settings(self.served, run)),
            gr.Dropdown(example_choices(run), value=None),
        )

    def pick(self, name: str, number: int | None) -> tuple[Any, Any]:
        """The text of an example, and no choice, so that it can be chosen again."""
        return gr.skip() if number is None else self.served.runs[name].examples[number].text, None

    def preset(self, preset: str, name: str) -> tuple[float, int, list[str]]:
        """Scale, rank and layers of one of PRESETS."""
        run = self.served.runs[name]
        top = max(position(each).block for each in run.layers)
        layers = [
            each for each in run.layers if preset != "only the top block" or position(each).block == top
        ]
        scale = -1.0 if preset == "opposite" and not run.off else 1.0
        rank = 1 if preset == "rank 1" and not run.off else rank_settings(self.served, run)["value"]
        return scale, rank, [] if preset == "base" else layers

    def _turned(self, name: str, scale: float, rank: float, layers: list[str]) -> tuple[ServedRun, Knobs]:
        run = self.served.runs[name]
        on = tuple(each for each in run.layers if each in layers)
        return run, Knobs(
            1.0 if run.off else scale,
            None if run.off or rank >= run.rank else int(rank),
            None if len(on) == len(run.layers) else on,
        )


def scale_settings(run: ServedRun) -> dict[str, Any]:
    """The scale slider of a run."""
    info = f"off: {run.off}" if run.off else "1 is the adapter, 0 the base, -1 its opposite"
    return {"value": 1, "interactive": not run.off, "info": info}


def rank_settings(served: Served, run: ServedRun) -> dict[str, Any]:
    """The rank slider of a run. Its range is that of all runs; a rank above the run's cuts nothing."""
    largest = max(1, *(each.rank for each in served.runs.values()))
    info = f"off: {run.off}" if run.off else f"of {run.rank}: the largest singular values of each ΔW"
    return {
        "minimum": 0, "maximum": largest, "value": run.rank or largest, "step": 1, "interactive": not run.off,
        "info": info,
    }  # fmt: skip


def layer_settings(served: Served, run: ServedRun) -> dict[str, Any]:
    """The switches of the layers that any run adapts, with those of this run on.

    They are the same for all runs, as the range of the ranks is: gradio refuses values outside, and when a
    visitor chooses another run, requests with the values of the one before may still be on their way.
    """
    names = sorted({name for each in served.runs.values() for name in each.layers}, key=_by_block)
    others = len(names) - len(run.layers)
    info = f"this run adapts {len(run.layers)} of these; the others have no effect" if others else None
    return {"choices": [(short_name(name), name) for name in names], "value": list(run.layers), "info": info}


def _by_block(name: str) -> tuple[int, str]:
    at = position(name)
    return at.block, at.projection


def example_choices(run: ServedRun) -> list[tuple[str, int]]:
    """The examples of a run, by their numbers."""
    kinds = [
        f"mistake: predicted {each.wrong} ({each.probability:.2f}), is {each.label}"
        if each.wrong
        else each.label
        for each in run.examples
    ]
    pairs = zip(kinds, run.examples, strict=True)
    return [(f"{kind} · {excerpt(each.text, 40)}", number) for number, (kind, each) in enumerate(pairs)]
