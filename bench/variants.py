"""LoRA, its variants and full fine-tuning: accuracy, each at a learning rate of its own, and cost.

`bench.grid` trains, `bench.paired` compares; here their results become tables, sentences and figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plotting
from bench.grid import METHODS, SETTINGS, Method, open_results, train_all
from bench.paired import FULL, LORA, REFERENCES, accuracy, compare, corrected_p, difference, points
from bench.steps import (
    QUICK_SHAPES,
    SHAPES,
    BenchModel,
    held_bytes,
    make_model,
    memory_bytes,
    milliseconds,
    ratio,
    time_in_turn,
)
from bench.tables import bullets, prose
from lora import LoRALinear
from train.config import load_recipe
from train.hardware import resolve_device, resolve_precision
from train.tables import markdown, mebibytes, quantity, size

LEVEL = 0.05
CHEAPER, DEARER = 0.95, 1.05  # less, and more, than this share of what LoRA needs
MARGIN = 0.01  # the loss of accuracy that the interval of a cheaper variant has to exclude
CAVEAT = (
    "Intervals and tests are over the test articles of these runs: they cover neither the noise of training"
    " again nor that of selecting a rate."
)
FAILED = 2  # times the validation loss at the selected rate


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """Trains what is missing on bbc, and on `data` (a folder or a name on the hub) if it is given.

    A quick run has the REFERENCES alone.
    """
    methods = [method for method in METHODS if not quick or method.name in REFERENCES]
    results = open_results(quick)
    sets = []
    for name in ("bbc",) if data is None else ("bbc", data):
        compared = [method for method in methods if name == "bbc" or method.on_all]
        sets.append(compare(name, train_all(name, compared, results, quick), REFERENCES))
    return {"sets": sets, "cost": measure_steps(methods, quick)}


def measure_steps(methods: Sequence[Method], quick: bool) -> dict[str, Any]:
    """Milliseconds and memory of a training step of each method, in interleaved rounds in one process.

    Methods with equal layers, such as LoRA and LoRA+, are measured once, under the first one's name.
    """
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    model_name, rows, length = QUICK_SHAPES[0] if quick else SHAPES[1]
    rounds = 2 if quick else 15
    models: dict[str, BenchModel] = {}
    first_of: dict[str, str] = {}
    measured_as = {}
    for method in methods:
        recipe = load_recipe("quickstart", {**SETTINGS, **method.fields})[1]
        config = recipe.lora_config()
        if config.init_lora_weights == "eva":  # its layers are LoRA's, and its ranks have the same sum
            config = dataclasses.replace(config, init_lora_weights=True)
        name = first_of.setdefault(f"{recipe.method} {config}", method.name)
        measured_as[method.name] = name
        if name not in models:
            models[name] = make_model(recipe.method, model_name, rows, length, precision, device, config)
    seconds = time_in_turn({name: model.step for name, model in models.items()}, rounds, device)
    measured = {
        name: {
            "milliseconds": milliseconds(seconds[name]),
            "held_bytes": held_bytes(memory_bytes(model)),
            "scaling": next((m.scaling for m in model.module.modules() if isinstance(m, LoRALinear)), None),
        }
        for name, model in models.items()
    }
    return {
        "model": model_name, "rows": rows, "length": length, "precision": precision, "rounds": rounds,
        "methods": {name: {"measured_as": same, **measured[same]} for name, same in measured_as.items()},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """A table and conclusions per dataset, and the table of costs."""
    words = (
        "Each method at the learning rate with the lowest validation loss on the first fold or seed, among"
        " four rates per decade, extended until the best one has a worse one on either side. In brackets, 95%"
        " intervals, each for one comparison alone. Differences are in points, paired by test article. p is"
        " from the exact sign-flip test, corrected by Holm's method for all comparisons on the dataset."
        f" {CAVEAT} A difference is called significant if p < {LEVEL} and it has the same sign on each fold"
        " or with each seed."
    )
    sets = [part for found in result["sets"] for part in _set_table(found)]
    return "\n\n".join([prose(words), *sets, *_cost_table(result)])


def _set_table(found: dict[str, Any]) -> list[str]:
    folds = found["folds"]
    apart = "without articles used to select" if folds else "by seed"
    against = (f"- {name}, corrected p" for name in REFERENCES)
    lines = [["", "rate", "accuracy, %", apart, *against]]
    for row in found["rows"]:
        values = [row["accuracy_unused"]] if folds else row["by_part"]
        lines.append(
            [
                row["name"],
                f"{row['learning_rate']:g}",
                accuracy(row),
                ", ".join(f"{100 * value:.2f}" for value in values),
                *(_against(row, reference) for reference in REFERENCES),
            ]
        )
    train, test, parts = found["train_articles"], found["test_articles"], found["parts"]
    if folds:
        words = (
            f"{test:,} articles in {parts} folds, so that each is a test article once, and about {train:,} to"
            f" train on. Rates are selected on the {found['used_to_select']} validation articles of the first"
            " fold, which are test articles of other folds. One column leaves them out; differences do not."
        )
    else:
        words = (
            f"{train:,} articles to train on, {test:,} test articles, {parts} seeds. Accuracy is the mean"
            " over seeds. Rates are selected with the first seed, on a part of the training articles."
        )
    words = (
        f"{found['data']}: {words} {found['model']}, {found['max_length_tokens']} tokens an article,"
        f" {found['epochs']} epochs in batches of {found['batch_size']}, {found['precision']},"
        f" {found['device']}."
    )
    return [prose(words), markdown(lines), bullets(conclusions(found))]


def _against(row: dict[str, Any], reference: str) -> str:
    """The difference from a reference, its interval and p: +0.24 (-0.31 to +0.78), 0.412."""
    pair = row["against"].get(reference)
    return f"{difference(pair)}, {corrected_p(pair)}" if pair else "-"


def conclusions(found: dict[str, Any]) -> list[str]:
    """What the tests of a dataset show, as sentences."""
    rows = {row["name"]: row for row in found["rows"]}
    lines = [difference_from(found, reference) for reference in REFERENCES if reference in rows]
    efficient = [row for row in found["rows"] if FULL in row["against"]]
    if efficient:
        highest = max(row["accuracy"] for row in efficient)
        pairs = [
            f"{row['name']} {difference(row['against'][FULL])}"
            for row in efficient
            if row["accuracy"] == highest
        ]
        lines.append(
            f"The highest accuracy without training all weights is {100 * highest:.2f}%. Minus that of"
            f" {FULL}, in points: {'; '.join(pairs)}. As the highest of {len(efficient)} on these test"
            " articles, it is probably overestimated."
        )
    edges = [row["name"] for row in found["rows"] if not row["interior"]]
    lines.append(
        f"The lowest or highest of the rates tried was the best for {'; '.join(edges)}, so a better one may"
        " exist."
        if edges
        else "Each selected rate had a worse one on either side."
    )
    failed = [
        f"{row['name']} at {tried['learning_rate']:g}"
        for row in found["rows"]
        for tried in row["sweep"]
        if _failed(row, tried)
    ]
    if failed:
        lines.append(
            f"Training fails, with a loss that is not finite or more than {FAILED} times that at the selected"
            f" rate: {'; '.join(failed)}."
        )
    lines.append(
        f"{found['runs']} runs of one thread each, which trained for {found['hours']:.1f} hours, added up."
    )
    return lines


def _failed(row: dict[str, Any], tried: dict[str, Any]) -> bool:
    """Whether training fails at this rate: the validation loss is not finite or FAILED times too high."""
    (selected,) = (each["loss"] for each in row["sweep"] if each["learning_rate"] == row["learning_rate"])
    return tried["loss"] is None or tried["loss"] > FAILED * selected


def _significant(found: dict[str, Any], reference: str) -> dict[str, dict[str, float]]:
    """The differences from the reference that are significant, by method.

    The test is over articles, so a difference is also required to have one sign on all folds or seeds: two
    trainings of one method can differ by as much on the same articles.
    """
    parts = {row["name"]: row["by_part"] for row in found["rows"]}
    significant = {}
    for row in found["rows"]:
        pair = row["against"].get(reference)
        if pair and pair["p_corrected"] < LEVEL:
            apart = [a - b for a, b in zip(parts[row["name"]], parts[reference], strict=True)]
            if all(each * pair["difference"] > 0 for each in apart):
                significant[row["name"]] = pair
    return significant


def difference_from(found: dict[str, Any], reference: str) -> str:
    """Which methods differ significantly from the reference, as a sentence."""
    compared = sum(reference in row["against"] for row in found["rows"])
    clear = _significant(found, reference)
    start = f"On {found['data']}, compared with {reference},"
    if not clear:
        return f"{start} no method differs significantly."
    words = []
    for word, sign in (("more accurate", 1), ("less accurate", -1)):
        names = [
            f"{name} ({points(pair['difference'])})"
            for name, pair in clear.items()
            if sign * pair["difference"] > 0
        ]
        if names:
            words.append(f"significantly {word}: {', '.join(names)}")
    rest = " For the other methods, no difference is shown." if len(clear) < compared else ""
    return f"{start} {'; '.join(words)}.{rest}"


def _cost_table(result: dict[str, Any]) -> list[str]:
    cost, (first, *_) = result["cost"], result["sets"]
    lines = [
        [
            "",
            "trained parameters",
            "of them LoRA",
            "saved",
            "scaling",
            "step, ms",
            f"step / {LORA}",
            "memory of a step, MiB",
        ]
    ]
    for row in first["rows"]:
        step = cost["methods"][row["name"]]
        lines.append(
            [
                row["name"],
                f"{row['trainable_parameters']:,}",
                f"{row['lora_parameters']:,}",
                size(row["adapter_bytes"]),
                "-" if step["scaling"] is None else f"{step['scaling']:g}",
                quantity(step["milliseconds"]["median"]),
                f"{_over_lora(cost, row['name']):.2f}",
                mebibytes(step["held_bytes"]),
            ]
        )
    shared = [
        f"{name} as {step['measured_as']}"
        for name, step in cost["methods"].items()
        if step["measured_as"] != name
    ]
    words = (
        f"Cost. Parameters and saved bytes are of {first['data']}. A step is of {cost['model']} at"
        f" {cost['rows']} x {cost['length']} tokens in {cost['precision']}: the median of {cost['rounds']}"
        " rounds in which all methods take turns, and the largest sum of weights, copies, gradients,"
        " optimizer state and saved tensors that it holds at once."
    )
    if shared:
        words += f" With equal layers, measured once: {', '.join(shared)}."
    return [prose(words), markdown(lines)]


def _over_lora(cost: dict[str, Any], name: str) -> float:
    return ratio(*(cost["methods"][each]["milliseconds"] for each in (name, LORA)))


def short_table(result: dict[str, Any]) -> str:
    """LoRA's variants against LoRA: trained parameters, step, accuracy, and what the tests show."""
    sets = result["sets"]
    heads = [head for found in sets for head in (f"accuracy on {found['data']}, %", f"- {LORA}, corrected p")]
    lines = [["", "trained parameters, with head", f"step / {LORA}", *heads]]
    for row in sets[0]["rows"]:
        if row["lora_parameters"]:
            over = _over_lora(result["cost"], row["name"])
            cells = [row["name"], f"{row['trainable_parameters']:,}", f"{over:.2f}"]
            for found in sets:
                same = next((other for other in found["rows"] if other["name"] == row["name"]), None)
                cells += [f"{100 * same['accuracy']:.2f}", _against(same, LORA)] if same else ["-", "-"]
            lines.append(cells)
    words = (
        f"{sets[0]['model']}, each method at the learning rate with the lowest validation loss: test"
        f" accuracy, the difference from {LORA} in points with its 95% interval, and p, corrected for the"
        f" number of comparisons. {CAVEAT}"
    )
    words += "".join(f" {difference_from(found, LORA)}" for found in sets) + f" {_cheaper(result)}"
    return "\n\n".join([markdown(lines), prose(words)])


def _cheaper(result: dict[str, Any]) -> str:
    """Which variants need less than LoRA and are not much less accurate where compared, as a sentence."""
    lowest: dict[str, tuple[float, str]] = {}  # the low end of an interval, and its dataset
    for found in result["sets"]:
        for row in found["rows"]:
            if LORA in row["against"]:
                low = row["against"][LORA]["low"], found["data"]
                lowest[row["name"]] = min(low, lowest.get(row["name"], low))
    cost = result["cost"]["methods"]
    needs = {
        row["name"]: {
            "trained parameters": row["trainable_parameters"],
            "saved bytes": row["adapter_bytes"],
            "time of a step": cost[row["name"]]["milliseconds"]["median"],
            "memory of a step": cost[row["name"]]["held_bytes"],
        }
        for row in result["sets"][0]["rows"]
        if row["lora_parameters"]
    }
    cheaper = []
    for name, needed in needs.items():
        shares = {what: n / needs[LORA][what] for what, n in needed.items()}
        less = [f"{share:.2f} of the {what}" for what, share in shares.items() if share < CHEAPER]
        if less and max(shares.values()) <= DEARER and lowest[name][0] > -MARGIN:
            end, data = lowest[name]
            cheaper.append(f"{name} ({', '.join(less)}; interval from {points(end)} on {data})")
    return (
        f"Cheaper than {LORA}, and by the interval less than {100 * MARGIN:g} point less accurate on the"
        f" datasets that it was trained on: {'; '.join(cheaper) or 'none'}."
    )


def figures(result: dict[str, Any], folder: Path) -> None:
    """variants.png: accuracy and loss by learning rate, and differences from LoRA, by dataset."""
    names = list(dict.fromkeys(row["name"] for found in result["sets"] for row in found["rows"]))
    styles = {name: _style(number) for number, name in enumerate(names)}
    figure, axes = plotting.panels(3, len(result["sets"]), 6.5, 3.8)
    for found, (accuracies, losses, differences) in zip(result["sets"], axes.T, strict=True):
        accuracies.set_title(found["data"])
        _draw_rates(accuracies, found, "accuracy", styles)
        _draw_rates(losses, found, "loss", styles)
        _draw_differences(differences, found, styles)
    plotting.save(figure, folder / "variants.png")


def _style(number: int) -> dict[str, Any]:
    """The style of a method's line: plotting.COLORS solid, dashed and dotted, with other markers."""
    again, index = divmod(number, len(plotting.COLORS))
    return {
        "color": plotting.COLORS[index],
        "linestyle": ("-", "--", ":")[again % 3],
        "marker": "os^vDP*"[(index + again) % 7],
    }


def _draw_rates(axis: Any, found: dict[str, Any], key: str, styles: dict[str, Any]) -> None:
    for row in found["rows"]:
        rates = [tried["learning_rate"] for tried in row["sweep"]]
        selected = [rates.index(row["learning_rate"])]
        values = [tried[key] for tried in row["sweep"]]
        axis.plot(rates, values, label=row["name"], markevery=selected, **styles[row["name"]])
    kept = [each[key] for row in found["rows"] for each in row["sweep"] if not _failed(row, each)]
    margin = 0.05 * (max(kept) - min(kept)) or 0.01  # or, where all are equal
    axis.set_ylim(min(kept) - margin, max(kept) + margin)  # a line to a rate that fails leaves the panel
    axis.set(xscale="log", xlabel="learning rate (marker: selected)", ylabel=f"validation {key}")


def _draw_differences(axis: Any, found: dict[str, Any], styles: dict[str, Any]) -> None:
    compared = [row for row in reversed(found["rows"]) if LORA in row["against"]]
    significant = _significant(found, LORA)
    for at, row in enumerate(compared):
        pair, color = row["against"][LORA], styles[row["name"]]["color"]
        low, middle, high = (100 * pair[key] for key in ("low", "difference", "high"))
        filled = color if row["name"] in significant else "white"
        axis.errorbar(
            middle, at, xerr=[[middle - low], [high - middle]], fmt="o", color=color, mfc=filled, capsize=3
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(compared)), [row["name"] for row in compared], fontsize=8)
    axis.set_xlabel(f"test accuracy minus that of {LORA}, points (filled: significant)")
