"""The playground's HTTP API: the functions of `Served` as gradio's endpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from train.playground.served import InputError, Knobs, Served


def add_api(served: Served) -> list[Callable[..., Any]]:
    """Adds the HTTP API to the page that is being built. Returns its functions."""

    def runs() -> dict[str, Any]:
        """The runs, with their layers, ranks, singular values of ΔW and ‖ΔW‖/‖W‖ by layer."""
        return {
            run.name: {
                "labels": list(served.labels), "layers": list(run.layers), "rank": run.rank,
                "singular_values": run.spectra, "delta_over_weight": run.sizes,
            }
            for run in served.runs.values()
        }  # fmt: skip

    def predict(
        run: str, text: str, scale: float = 1.0, rank: int | None = None, layers: list[str] | None = None
    ) -> dict[str, Any]:
        """The class probabilities of a text: base, adapter, and with the knobs (null: all)."""
        return served.classify(run, text, _api_knobs(scale, rank, layers))

    def influence(
        run: str, text: str, scale: float = 1.0, rank: int | None = None, layers: list[str] | None = None
    ) -> dict[str, Any]:
        """The predicted class, and [start, end, influence] of each piece of a text."""
        pieces, label = served.influence(run, text, _api_knobs(scale, rank, layers))
        return {"label": label, "pieces": pieces}

    def accuracy(
        run: str, part: str = "sample", scale: float = 1.0, rank: int | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The scores on the validation "sample" or on the "test" part."""
        *_, (rows, scores) = served.score(run, _api_knobs(scale, rank, layers), part)
        return {
            "rows": rows, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1,
            "confusion_matrix": scores.confusion.tolist(),
        }  # fmt: skip

    def excitation(run: str, text: str) -> dict[str, Any]:
        """The tokens of a text, and ‖A·x‖ by layer for each of them."""
        tokens, norms = served.excitation(run, text)
        return {"tokens": tokens, "norms": norms}

    def mix(text: str, weights: dict[str, float]) -> dict[str, list[float]]:
        """The class probabilities by each run and by the weighted sum of their ΔW, in one forward."""
        return served.mix(text, weights)

    def merge(run: str, text: str) -> dict[str, Any]:
        """Merges and unmerges: probabilities, digests of all weights, seconds."""
        return served.merge_and_unmerge(run, text)

    functions: list[Any] = [runs, predict, influence, accuracy, excitation, mix, merge]
    for function in functions:
        gr.api(_refusing(function), api_name=function.__name__, queue=False, concurrency_limit=None)
    return functions


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an InputError as gradio's error, whose message the caller gets."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def _api_knobs(scale: float, rank: int | None, layers: list[str] | None) -> Knobs:
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(each, str) for each in layers)
    ):
        raise InputError("layers: not a list of names")
    return Knobs(scale, rank, None if layers is None else tuple(layers))
