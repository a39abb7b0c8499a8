"""The figures of the page. Each is drawn for light and dark mode, narrow enough to read on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from train.anatomy.measure import EPSILON
from train.anatomy.run import middle_layers, position
from train.metrics import Scores
from train.run_figures import draw_confusion, draw_curves, plain
from train.telemetry import watched_lines
from train.themes import BLUE, CYCLE, GREEN, GREY, ORANGE, Drawing, draw_themes

_SIZE = (5.2, 3.4)

Facts = dict[str, Any]
Layers = dict[str, Facts]


def draw_figures(facts: Facts, scores: Scores, lines: list[Facts], folder: Path) -> dict[str, str]:
    """Draws the contents of `facts` (anatomy.json) into `folder` as NAME.png and NAME-dark.png.

    Returns the names with their alternative texts.
    """
    found: dict[str, str] = {}
    for name, (alt, drawing) in _drawings(facts, scores, lines).items():
        for suffix, png in draw_themes(drawing).items():
            (folder / f"{name}{suffix}.png").write_bytes(png)
        found[name] = alt
    return found


def _drawings(facts: Facts, scores: Scores, lines: list[Facts]) -> dict[str, tuple[str, Drawing]]:
    layers: Layers = facts["layers"]
    run = facts["run"]
    found: dict[str, tuple[str, Drawing]] = {
        "curves": ("Accuracy and loss by epoch", lambda: draw_curves([(run["name"], lines)])),
        "confusion": ("Confusion matrix", lambda: draw_confusion(scores, tuple(run["labels"]))),
        "size": (
            "Size of ΔW relative to W by layer",
            lambda: _bars(layers, "delta_over_weight", "‖ΔW‖ / ‖W‖"),
        ),
        "moved": (
            "Change of A from its initial value, by layer",
            lambda: _bars(layers, "moved_A", "‖A - initial A‖ / ‖initial A‖"),
        ),
        "spectra": ("Singular values of ΔW by layer", lambda: _spectra(layers)),
        "ranks": ("Effective and stable rank by layer", lambda: _ranks(layers)),
        "amplification": (
            "Amplification factor by layer",
            lambda: _bars(layers, "amplification", "‖ΔW‖ / ‖UᵀWV‖"),
        ),
        "intruders": ("Nearest cosines of the strongest singular vectors", lambda: _nearest(facts)),
    }
    for number, other in enumerate(facts["similarity"]):
        found[f"similarity-{number}"] = (
            f"Subspace similarity with {other['name']}",
            partial(_heatmaps, other, facts["run"]["name"]),
        )
    if facts["full"]:
        full = facts["full"]
        found["energy"] = ("Energy of the full update by rank", lambda: _energy(full["layers"]))
        found["angles"] = ("Principal angles to the full update", lambda: _angles(full["layers"]))
        if full["truncated"]:
            found["full-truncated"] = ("The full update truncated", lambda: _full_truncated(full))
    if facts["experiments"]:
        experiments = facts["experiments"]
        found["parts"] = ("Loss without each block, and with one alone", lambda: _parts(experiments))
        found["truncated"] = ("Scores by rank of ΔW", lambda: _truncated(experiments))
        found["scaled"] = ("Scores by scaling", lambda: _scaled(experiments))
        found["trace"] = ("Logits by number of enabled blocks", lambda: _trace(facts["trace"]))
    if facts["telemetry"]:
        watched = watched_lines(lines)
        names = facts["telemetry"]["layers"]
        for key, alt, label in (
            ("delta_over_weight", "Size of ΔW while training", "‖ΔW‖ / ‖W‖"),
            ("effective_rank", "Effective rank while training", "effective rank of ΔW"),
            ("gradient_norm_A", "Norm of A's gradient while training", "‖∂L/∂A‖"),
            ("gradient_norm_B", "Norm of B's gradient while training", "‖∂L/∂B‖"),
        ):
            if key in facts["telemetry"]["measured"]:
                found[f"telemetry-{key}"] = (alt, partial(_over_time, watched, names, key, label))
    return found


def _axes(**labels: Any) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=_SIZE)
    axes.set(**labels)
    axes.grid(alpha=0.5)
    return figure, axes


def _by_projection(layers: Layers) -> dict[str, dict[int, Facts]]:
    """Projection -> block -> the facts of that layer."""
    found: dict[str, dict[int, Facts]] = {}
    for name, layer in layers.items():
        at = position(name)
        found.setdefault(at.projection, {})[at.block] = layer
    return found


def _bars(layers: Layers, key: str, label: str) -> Any:
    figure, axes = _axes(xlabel="block of the encoder", ylabel=label)
    groups = _by_projection(layers)
    blocks = sorted({block for group in groups.values() for block in group})
    width = 0.8 / len(groups)
    for number, (projection, group) in enumerate(groups.items()):
        shift = (number - (len(groups) - 1) / 2) * width
        at = [blocks.index(block) + shift for block in group]
        axes.bar(at, [layer[key] for layer in group.values()], width * 0.92, label=projection)
    axes.set_xticks(range(len(blocks)), blocks)
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=min(len(groups), 2), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _shades(count: int) -> Any:
    """Colours from the first to the last block that are visible on white and on black."""
    return plt.get_cmap("plasma")(np.linspace(0.33, 0.75, count))


def _panels(count: int, **sizes: Any) -> tuple[Any, list[Any]]:
    """`count` small panels, two per row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, squeeze=False, **sizes, figsize=(5.2, 2.5 * rows + 0.6))
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def _spectra(layers: Layers) -> Any:
    groups = _by_projection(layers)
    figure, panels = _panels(len(groups), sharey=True)
    for axes, (projection, group) in zip(panels, groups.items(), strict=True):
        for color, (block, layer) in zip(_shades(len(group)), group.items(), strict=True):
            values = layer["singular_values"]
            axes.plot(range(1, len(values) + 1), values, "o-", ms=3, lw=1.2, color=color, label=block)
        axes.set(xlabel="direction", title=projection, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.5)
    panels[0].set_ylabel("singular value of ΔW")
    panels[-1].legend(title="block", fontsize=7, title_fontsize=7.5, ncols=2)
    figure.tight_layout()
    return figure


def _ranks(layers: Layers) -> Any:
    figure, axes = _axes(xlabel="block of the encoder", ylabel="rank")
    for color, (projection, group) in zip(CYCLE, _by_projection(layers).items(), strict=False):
        for key, words, style in (
            ("effective_rank", "effective", "o-"), ("rank_90", "for 90% of the energy", "s:"),
            ("stable_rank", "stable", "^--"),
        ):  # fmt: skip
            values = [layer[key] for layer in group.values()]
            axes.plot(list(group), values, style, ms=4, lw=1.2, color=color, label=f"{projection}, {words}")
    axes.set_ylim(0, max(layer["r"] for layer in layers.values()) + 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=7.5)
    return figure


def _heatmaps(other: Facts, name: str) -> Any:
    """φ(i, j) for each projection of the middle block, as in the LoRA paper's figures 3 and 4."""
    layers: Layers = other["layers"]
    chosen = {layer: layers[layer] for layer in middle_layers(layers)}
    panels = []
    for layer, facts in chosen.items():
        at = position(layer)
        panels.append((f"{at.projection}, block {at.block}", facts["phi"]))
    first = next(iter(chosen))
    panels.append((f"{position(first).projection}, before training", chosen[first]["phi_start"]))
    panels.append(("random directions", chosen[first]["random"]))
    figure, grid = _panels(len(panels))
    for axes, (title, phi) in zip(grid, panels, strict=True):
        values = np.asarray(phi)
        rows, columns = values.shape
        image = axes.imshow(
            values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="upper", interpolation="nearest",
            extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
        )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[:].set_visible(False)
    for axes in grid[::2]:
        axes.set_ylabel(f"i: {plain(name)}", fontsize=8)
    for axes in grid[-2:]:
        axes.set_xlabel(f"j: {plain(other['name'])}", fontsize=8)
    figure.tight_layout()
    figure.colorbar(image, ax=grid, label="φ(i, j)", fraction=0.04, pad=0.03)
    return figure


def _nearest(facts: Facts) -> Any:
    figure, axes = _axes(
        xlabel="singular vector of the tuned W, strongest first", ylabel="cosine with the nearest one of W"
    )
    sources = [("LoRA", facts["layers"], BLUE, 0.0)]
    if facts["full"]:
        sources = [
            ("LoRA", facts["layers"], BLUE, -0.13),
            ("full fine-tuning", facts["full"]["layers"], ORANGE, 0.13),
        ]
    for label, layers, color, shift in sources:
        rows = [layer["nearest_cosines"] for layer in layers.values()]
        for row in rows:
            axes.plot(np.arange(1, len(row) + 1) + shift, row, "o", ms=3, alpha=0.55, color=color)
        axes.plot([], [], "o", color=color, label=f"{label}, one point per layer")
    axes.axhline(EPSILON, color=GREY, ls="--", label=f"ε = {EPSILON}: an intruder below")
    axes.set_ylim(0, 1.03)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7.5)
    return figure


def _energy(layers: Layers) -> Any:
    figure, axes = _axes(xlabel="rank", ylabel="share of ‖update‖²", ylim=(0, 1.03), xscale="log")
    styles = (
        ("energy", "its own best directions", BLUE), ("captured_by_lora", "LoRA's directions", ORANGE),
        ("captured_by_random", "random directions", GREY),
    )  # fmt: skip
    for key, label, color in styles:
        _layers_and_mean(axes, [layer[key] for layer in layers.values()], color, label=label, lw=2.4)
    axes.legend(fontsize=8)
    return figure


def _angles(layers: Layers) -> Any:
    figure, axes = _axes(xlabel="principal angle, the smallest first", ylabel="degrees", ylim=(0, 92))
    for key, label, color in (
        ("angles_outputs", "outputs (U)", BLUE), ("angles_inputs", "inputs (V)", ORANGE),
    ):  # fmt: skip
        rows = [np.degrees(layer[key]) for layer in layers.values()]
        _layers_and_mean(axes, rows, color, label=label, marker="o", ms=4, lw=2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")
    return figure


def _layers_and_mean(axes: Any, rows: Sequence[Any], color: str, **style: Any) -> None:
    """A thin line per layer, and their mean in `style`, over the length of the shortest."""
    for row in rows:
        axes.plot(range(1, len(row) + 1), row, lw=0.7, alpha=0.45, color=color)
    length = min(map(len, rows))
    mean = np.mean([row[:length] for row in rows], axis=0)
    axes.plot(range(1, length + 1), mean, color=color, **style)


def _full_truncated(full: Facts) -> Any:
    rows = full["truncated"]
    return _two_scales(
        [("all" if row["rank"] is None else str(row["rank"])) for row in rows], rows,
        "rank of the full update, in every linear layer of the encoder",
    )  # fmt: skip


def _truncated(experiments: Facts) -> Any:
    rows = experiments["truncated"]
    return _two_scales([str(row["rank"]) for row in rows], rows, "rank of the truncated ΔW, in every layer")


def _scaled(experiments: Facts) -> Any:
    rows = experiments["scaled"]
    figure = _two_scales(
        [f"{row['factor']:g}" for row in rows], rows, "scaling, as a multiple of the trained one"
    )
    figure.axes[0].tick_params(axis="x", labelsize=8)
    return figure


def _two_scales(ticks: list[str], rows: list[Facts], label: str) -> Any:
    """Accuracy above cross-entropy, with the same ticks."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(5.2, 4.2))
    upper.plot([100 * row["accuracy"] for row in rows], "o-", color=BLUE)
    upper.set_ylabel("accuracy, %")
    lower.plot([row["loss"] for row in rows], "o-", color=ORANGE)
    lower.set(ylabel="cross-entropy, nats", xlabel=label, ylim=(0, None))
    lower.set_xticks(range(len(ticks)), ticks)
    for axes in (upper, lower):
        axes.grid(alpha=0.5)
    figure.tight_layout()
    return figure


def _parts(experiments: Facts) -> Any:
    kind = "block" if "without_block" in experiments else "projection"
    without, alone = experiments.get(f"without_{kind}", {}), experiments.get(f"only_{kind}", {})
    figure, panels = plt.subplots(2, 1, sharex=True, figsize=(5.2, 4.4))
    for axes, (key, label, factor) in zip(
        panels, (("accuracy", "accuracy, %", 100), ("loss", "cross-entropy, nats", 1)), strict=True
    ):
        for rows, words, color, shift in (
            (without, f"without this {kind}", BLUE, -0.19), (alone, f"only this {kind}", ORANGE, 0.19),
        ):  # fmt: skip
            axes.bar(
                np.arange(len(rows)) + shift,
                [factor * row[key] for row in rows.values()],
                0.35,
                color=color,
                label=words,
            )
        axes.axhline(factor * experiments["whole"][key], color=GREEN, lw=1.5, label="whole adapter")
        axes.axhline(factor * experiments["off"][key], color=GREY, lw=1.5, ls="--", label="no adapter")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.5)
    rows = [experiments["off"], experiments["whole"], *without.values(), *alone.values()]
    low = min(row["accuracy"] for row in rows)
    panels[0].set_ylim(max(0, 100 * low - 3), 100.5)
    panels[1].set_xticks(range(len(without)), without)
    panels[1].set_xlabel(f"{kind} of the encoder")
    panels[0].legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
    figure.tight_layout()
    return figure


def _trace(trace: Facts) -> Any:
    figure, axes = _axes(xlabel="blocks with the adapter enabled, from the first", ylabel="logit")
    rows = np.asarray([step["logits"] for step in trace["steps"]])
    for number, label in enumerate(trace["labels"]):
        axes.plot(rows[:, number], "o-", ms=4, color=CYCLE[number % len(CYCLE)], label=plain(label))
    ticks = ["none" if step["block"] is None else f"+{step['block']}" for step in trace["steps"]]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _over_time(lines: list[Facts], names: list[str], key: str, label: str) -> Any:
    """A line per layer: the shade gives its block, the style its projection."""
    figure, axes = _axes(xlabel="step", ylabel=label)
    steps = [line["step"] for line in lines]
    blocks = sorted({position(name).block for name in names})
    shades = dict(zip(blocks, _shades(len(blocks)), strict=True))
    projections = list(dict.fromkeys(position(name).projection for name in names))
    styles = {projection: ("-", "--", ":", "-.")[at % 4] for at, projection in enumerate(projections)}
    for number, name in enumerate(names):
        at = position(name)
        axes.plot(
            steps,
            [line[key][number] for line in lines],
            styles[at.projection],
            color=shades[at.block],
            lw=1.2,
        )
    axes.set_ylim(0, None)
    handles = [Line2D([], [], color=shades[block], label=f"block {block}") for block in blocks]
    handles += [
        Line2D([], [], color=GREY, ls=styles[projection], label=projection) for projection in projections
    ]
    axes.legend(handles=handles, ncols=4, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
