"""The playground's page and HTTP API in gradio, on the loopback address alone.

The values of all controls belong to the visitor's browser and come with every request. Between two requests
the server keeps only the settings that a visitor has tried, in that visitor's session.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from train.anatomy.run import position, short_name
from train.playground import page
from train.playground.runs import ServedRun
from train.playground.served import InputError, Knobs, Served
from train.tables import excerpt

_HOST = "127.0.0.1"
_MOST_BYTES = 8 * 2**20  # of a request: a text of the largest size, with every character escaped in JSON
_MOST_TRIES = 200  # settings that a visitor's curve shows
# What the page and its HTTP API need of gradio's routes. Uploads, files and proxies are not among them.
_ROUTES = re.compile(
    r"/|/(assets|static|svelte)/.*|/(theme\.css|favicon\.ico|config|manifest\.json)"
    r"|/gradio_api/((run|call|heartbeat)/.*|queue/(join|data)|cancel|info|openapi\.json|startup-events)"
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'none'"
)

Report = Callable[[str], None]


def serve(folders: Sequence[Path], report: Report) -> None:
    """Serves the page until Ctrl-C. Raises RunError, and what loading raises."""
    # The browser needs a core too: torch's threads wait for each other at every step if they share one.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    report("loading")
    demo, url = launch(Served(folders))
    report(f"open {url} in a browser; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        demo.close(verbose=False)


def launch(served: Served) -> tuple[gr.Blocks, str]:
    """Starts the server on a free port of the loopback address. Returns the page, to close, and its URL."""
    demo = build(served)
    _, url, _ = demo.launch(
        server_name=_HOST, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], css=_css(served),
        theme=_theme(), app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
    )  # fmt: skip
    return demo, url


class Guard:
    """ASGI middleware that answers requests of this page alone: its host, origin and routes, up to a size."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        host, length = headers.get("host", ""), headers.get("content-length", "")
        refusal = None
        # A name of another site that resolves to 127.0.0.1 must not reach the page either.
        if not re.fullmatch(rf"({re.escape(_HOST)}|localhost)(:\d+)?", host):
            refusal = (403, "this page is for 127.0.0.1 and localhost alone")
        elif "origin" in headers and headers["origin"] != f"http://{host}":
            refusal = (403, "another site cannot use this page")
        elif not _ROUTES.fullmatch(scope["path"]):
            refusal = (404, "there is no such page")
        elif scope["method"] == "POST" and not (length.isdecimal() and int(length) <= _MOST_BYTES):
            refusal = (413, f"a request needs a Content-Length of at most {_MOST_BYTES} bytes")
        if refusal:
            code, message = refusal
            await PlainTextResponse(message, code)(scope, receive, send)
            return

        async def send_with_policy(event: Any) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    *event.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(event)

        await self.app(scope, receive, send_with_policy)


def build(served: Served) -> gr.Blocks:
    """The page of these runs, not started."""
    names = list(served.runs)
    run = served.runs[names[0]]
    live = {"queue": True, "show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    with gr.Blocks(title="LoRA playground", analytics_enabled=False) as demo:
        gr.HTML(page.show_head(served))
        tries = gr.State({"latest": 0, "tries": []})
        name = gr.Radio(names, value=names[0], label="run", visible=len(names) > 1, elem_id="run")

        gr.HTML("<h2>Try</h2>")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(run.examples[0].text, label="text", lines=6, max_lines=12, elem_id="text")
                example = gr.Dropdown(
                    _examples(run), value=None, label="or an example from the test part", elem_id="example"
                )
            with gr.Column():
                probabilities = gr.HTML(elem_id="probabilities")
        tokens = gr.HTML(elem_id="tokens")

        gr.HTML("<h2>Turn the knobs</h2>")
        with gr.Row():
            with gr.Column():
                scale = gr.Slider(
                    -1, 2, 1, step=0.05, label="scale of ΔW", info="1 is the adapter, 0 the base",
                    elem_id="scale", buttons=[],
                )  # fmt: skip
                rank = gr.Slider(**_rank_settings(run), elem_id="rank", buttons=[])
                layers = gr.CheckboxGroup(**_layer_settings(run), elem_id="layers")
                with gr.Row(elem_id="presets"):
                    presets = {preset: gr.Button(preset, size="sm", min_width=100) for preset in _PRESETS}
            with gr.Column():
                accuracy = gr.HTML(elem_id="accuracy")
                curve = gr.HTML(elem_id="curve")
                test = gr.Button("score the whole test part with these knobs", elem_id="test")
                test_score = gr.HTML(elem_id="test-score")

        gr.HTML("<h2>See inside</h2>")
        spectra = gr.HTML(elem_id="spectra")
        heat = gr.HTML(elem_id="heat")

        gr.HTML("<h2>Compare and mix</h2>")
        with gr.Row():
            with gr.Column():
                weights = [
                    gr.Slider(
                        -1, 2, round(1 / len(names), 2), step=0.05, label=f"weight of {each.name}",
                        interactive=not each.off, info=each.off or None, buttons=[], elem_classes="weight",
                    )
                    for each in served.runs.values()
                ]  # fmt: skip
            with gr.Column():
                mixed = gr.HTML(elem_id="mixed")

        gr.HTML("<h2>Merge</h2>")
        gr.HTML(page.show_note(
            "Merging writes W + ΔW in place of W, and unmerging restores W. Other visitors wait meanwhile."
        ))  # fmt: skip
        merge = gr.Button("merge, classify the text, and unmerge", elem_id="merge")
        merged = gr.HTML(elem_id="merged")
        gr.HTML("<h2>HTTP API</h2>")

        knobs = [name, scale, rank, layers]
        moved = [control.change for control in knobs]

        def turned(name: str, *values: Any) -> tuple[ServedRun, Knobs]:
            return served.runs[name], _knobs(served.runs[name], *values)

        @_shown
        def classify(text: str, *values: Any) -> str:
            run, changed = turned(*values)
            return page.show_probabilities(served.classify(run.name, text, changed), text)

        @_shown
        def explain(text: str, *values: Any) -> str:
            run, changed = turned(*values)
            return page.show_tokens(*served.influence(run.name, text, changed), text)

        def sample(session: dict[str, Any], *values: Any) -> Iterator[tuple[str, str]]:
            run, changed = turned(*values)
            session["latest"] += 1
            number = session["latest"]
            for rows, scores in served.score(run.name, changed):
                if session["latest"] != number:  # the knobs have moved on
                    return
                yield page.show_score("validation articles", rows, scores), gr.skip()
            session["tries"].append({"knobs": page.describe(run, changed), "accuracy": scores.accuracy})
            del session["tries"][:-_MOST_TRIES]
            yield page.show_score("validation articles", rows, scores), page.show_history(session["tries"])

        def score_test(*values: Any) -> Iterator[str]:
            run, changed = turned(*values)
            for rows, scores in served.score(run.name, changed, "test"):
                yield page.show_score("test articles", rows, scores, interval=True)

        @_shown
        def excite(text: str, name: str) -> str:
            return page.show_excitation(*served.excitation(name, text))

        @_shown
        def mix(text: str, *values: float) -> str:
            found = dict(zip(names, values, strict=True))
            usable = {each: weight for each, weight in found.items() if not served.runs[each].off}
            return page.show_mix(served.labels, served.mix(text, usable))

        @_shown
        def merge_now(text: str, name: str) -> str:
            return page.show_merge(served.merge_and_unmerge(name, text))

        def choose(name: str) -> tuple[Any, Any, Any]:
            run = served.runs[name]
            return (
                gr.Slider(**_rank_settings(run)),
                gr.CheckboxGroup(**_layer_settings(run)),
                gr.Dropdown(_examples(run), value=None),
            )

        def pick(name: str, number: int | None) -> Any:
            return gr.skip() if number is None else served.runs[name].examples[number].text

        name.change(choose, name, [rank, layers, example], **live)
        example.input(pick, [name, example], text, **live)
        for preset, button in presets.items():
            button.click(functools.partial(_preset, served, preset), name, [scale, rank, layers], **live)
        latest = {"trigger_mode": "always_last", **live}
        gr.on([demo.load, text.change, *moved], classify, [text, *knobs], probabilities, **latest)
        gr.on([demo.load, text.change, *moved], explain, [text, *knobs], tokens, **latest)
        gr.on(
            [demo.load, *moved], sample, [tries, *knobs], [accuracy, curve], trigger_mode="multiple", **live
        )
        gr.on(
            [demo.load, *moved], lambda *values: page.show_spectra(*turned(*values)), knobs, spectra, **latest
        )
        gr.on([demo.load, text.change, name.change], excite, [text, name], heat, **latest)
        gr.on(
            [demo.load, text.change, *(each.change for each in weights)],
            mix,
            [text, *weights],
            mixed,
            **latest,
        )
        test.click(score_test, knobs, test_score, trigger_mode="once", **live)
        merge.click(merge_now, [text, name], merged, trigger_mode="once", **live)
        gr.HTML(page.show_api(run, _add_api(served)))
    return demo


def _add_api(served: Served) -> list[Callable[..., Any]]:
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


def _shown(function: Callable[..., str]) -> Callable[..., str]:
    """The function with the message of an InputError as its result."""

    @functools.wraps(function)
    def call(*values: Any) -> str:
        try:
            return function(*values)
        except InputError as error:
            return page.show_message(str(error))

    return call


def _api_knobs(scale: float, rank: int | None, layers: list[str] | None) -> Knobs:
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(each, str) for each in layers)
    ):
        raise InputError("layers: not a list of names")
    return Knobs(scale, rank, None if layers is None else tuple(layers))


def _knobs(run: ServedRun, scale: float, rank: float, layers: list[str]) -> Knobs:
    """The knobs of the page's controls, which may still hold the values of another run."""
    on = tuple(name for name in run.layers if name in layers)
    return Knobs(
        1.0 if run.off else scale,
        None if run.off or rank >= run.rank else int(rank),
        None if len(on) == len(run.layers) else on,
    )


_PRESETS = ("the adapter", "rank 1", "only the top block", "opposite", "base")


def _preset(served: Served, preset: str, name: str) -> tuple[float, int, list[str]]:
    """scale, rank and layers of a preset."""
    run = served.runs[name]
    top = max(position(each).block for each in run.layers)
    layers = [each for each in run.layers if preset != "only the top block" or position(each).block == top]
    scale = {"opposite": -1.0}.get(preset, 1.0)
    return scale, 1 if preset == "rank 1" else max(run.rank, 1), [] if preset == "base" else layers


def _rank_settings(run: ServedRun) -> dict[str, Any]:
    return {
        "minimum": 0, "maximum": max(run.rank, 1), "value": max(run.rank, 1), "step": 1,
        "label": "rank kept", "interactive": not run.off,
        "info": f"off: {run.off}" if run.off else "the strongest singular values of ΔW in each layer",
    }  # fmt: skip


def _layer_settings(run: ServedRun) -> dict[str, Any]:
    choices = [(short_name(name), name) for name in run.layers]
    return {"choices": choices, "value": list(run.layers), "label": "layers with the adapter"}


def _examples(run: ServedRun) -> list[tuple[str, int]]:
    names = []
    for number, example in enumerate(run.examples):
        kind = f"mistake: {example.wrong} for {example.label}" if example.wrong else example.label
        names.append((f"{kind} · {excerpt(example.text, 40)}", number))
    return names


def _theme() -> Any:
    """Gradio's default theme with the fonts of the computer, and grey texts with enough contrast."""
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    soft = "*body_text_color_subdued"
    return theme.set(
        body_text_color_subdued="#59636e", body_text_color_subdued_dark="#9aa4af",
        block_info_text_color=soft, block_info_text_color_dark=soft,
        block_label_text_color=soft, block_label_text_color_dark=soft,
    )  # fmt: skip


def _css(served: Served) -> str:
    projections = max(len({position(name).projection for name in run.layers}) for run in served.runs.values())
    rules = (Path(__file__).parent.parent / "templates" / "playground.css").read_text(encoding="utf-8")
    return f"{rules}:root {{ --projections: {projections}; }}"
