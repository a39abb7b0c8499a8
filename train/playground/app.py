"""The playground's page in gradio, on the loopback address alone.

The values of all controls belong to the visitor's browser and come with every request. Between two requests
the server keeps only the settings that a visitor has tried, in that visitor's session.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from train.anatomy.run import position
from train.playground import page
from train.playground.api import add_api
from train.playground.guard import HOST, Guard
from train.playground.handlers import (
    PRESETS,
    Handlers,
    example_choices,
    layer_settings,
    rank_settings,
    scale_settings,
)
from train.playground.served import LONGEST_TEXT, Served

Report = Callable[[str], None]


def serve(folders: Sequence[Path], report: Report) -> None:
    """Serves the page until Ctrl-C. Raises RunError, and what loading raises."""
    report("loading")
    served = Served(folders)
    demo, url = launch(served)
    report(f"open {url} in a browser; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        served.ended.set()
        demo.close(verbose=False)


def launch(served: Served) -> tuple[gr.Blocks, str]:
    """Starts the server on a free port of the loopback address. Returns the page, to close, and its URL."""
    demo = build(served)
    _, url, _ = demo.launch(
        server_name=HOST, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], css=_css(served),
        theme=_theme(), app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
    )  # fmt: skip
    return demo, url


def build(served: Served) -> gr.Blocks:
    """The page of these runs, not started."""
    names = list(served.runs)
    run = served.runs[names[0]]
    on = Handlers(served)
    live = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    with gr.Blocks(title="LoRA playground", analytics_enabled=False) as demo:
        gr.HTML(page.show_head(served))
        session = gr.State({})
        name = gr.Radio(names, value=names[0], label="run", visible=len(names) > 1, elem_id="run")

        gr.HTML("<h2>Try</h2>")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(
                    run.examples[0].text,
                    label="text",
                    lines=6,
                    max_lines=12,
                    max_length=LONGEST_TEXT,
                    elem_id="text",
                )
                example = gr.Dropdown(
                    example_choices(run),
                    value=None,
                    label="or an example",
                    elem_id="example",
                )
            with gr.Column():
                probabilities = gr.HTML(elem_id="probabilities")
        tokens = gr.HTML(elem_id="tokens")

        gr.HTML("<h2>Turn the knobs</h2>")
        gr.HTML(page.show_note(
            "Change one at a time, and watch the probabilities above and the accuracy here: how much of ΔW "
            "does the decision need? A layer is a projection in a block; block 0 is next to the input."
        ))  # fmt: skip
        with gr.Row():
            with gr.Column():
                scale = gr.Slider(
                    -1, 2, step=0.05, label="scale of ΔW", elem_id="scale", buttons=[], **scale_settings(run)
                )
                rank = gr.Slider(label="rank kept", elem_id="rank", buttons=[], **rank_settings(served, run))
                layers = gr.CheckboxGroup(
                    label="layers with the adapter", elem_id="layers", **layer_settings(served, run)
                )
                with gr.Row(elem_id="presets"):
                    presets = {preset: gr.Button(preset, size="sm", min_width=100) for preset in PRESETS}
            with gr.Column():
                accuracy = gr.HTML(elem_id="accuracy")
                curve = gr.HTML(elem_id="curve")
                test = gr.Button("score the whole test part with these knobs", elem_id="test")
                test_score = gr.HTML(elem_id="test-score")

        gr.HTML("<h2>See inside</h2>")
        spectra = gr.HTML(elem_id="spectra")
        heat = gr.HTML(elem_id="heat")

        gr.HTML("<h2>Compare and mix</h2>")
        gr.HTML(
            page.show_note("Each run classifies the text above. Weights add up their ΔW to another adapter.")
        )
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
        stored = run.recipe.base_precision
        gr.HTML(page.show_note(
            "Merging writes W + ΔW in place of W, and unmerging restores W. Other visitors wait meanwhile."
            if stored == "fp32" else f"The base is stored in {stored}, into which ΔW cannot be merged."
        ))  # fmt: skip
        merge = gr.Button("merge, classify the text, and unmerge", elem_id="merge", visible=stored == "fp32")
        merged = gr.HTML(elem_id="merged")
        gr.HTML("<h2>HTTP API</h2>")

        knobs = [name, scale, rank, layers]
        example.input(on.pick, [name, example], [text, example], **live)
        by_run = [name.input(on.choose, name, [scale, rank, layers, example], **live)]
        by_preset = [
            button.click(functools.partial(on.preset, preset), name, [scale, rank, layers], **live)
            for preset, button in presets.items()
        ]
        by_hand = [demo.load, scale.input, rank.input, layers.input]

        def listen(triggers: list[Any], changes: list[Any], *event: Any, **how: Any) -> None:
            """Listens to a visitor's input, and to changes by the server, which raise no input event."""
            gr.on(triggers, *event, **how, **live)
            for change in changes:
                change.then(*event, **how, **live)

        moved = by_run + by_preset
        latest = {"trigger_mode": "always_last"}
        listen([text.change, *by_hand], moved, on.classify, [text, *knobs], probabilities, **latest)
        listen([text.change, *by_hand], moved, on.explain, [text, *knobs], tokens, **latest)
        listen(by_hand, moved, on.sample, [session, *knobs], [accuracy, curve], trigger_mode="multiple")
        listen(by_hand, moved, on.look_inside, knobs, spectra, **latest)
        listen([demo.load, text.change], by_run, on.excite, [text, name], heat, **latest)
        weighed = [demo.load, text.change, *(weight.input for weight in weights)]
        listen(weighed, [], on.compare, [text, *weights], mixed, **latest)
        test.click(on.score_test, knobs, test_score, trigger_mode="once", **live)
        merge.click(on.merge_now, [text, name], merged, trigger_mode="once", **live)
        gr.HTML(page.show_api(run, add_api(served)))
    return demo


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
