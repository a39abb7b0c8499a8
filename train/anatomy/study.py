"""The analysis of a run: computes everything, and writes the numbers, the figures and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import first_line
from lora.storage import write_atomically
from model.packages import DataPackageMissingError
from train.anatomy.experiments import Report, mistakes, run_experiments, trace, truncate_full
from train.anatomy.measure import (
    EPSILON,
    TOP,
    compare_full,
    compare_runs,
    decompose_bases,
    measure,
    measure_amplification,
)
from train.anatomy.page_figures import draw_figures
from train.anatomy.run import Run, check_same_start, load_run, middle_layers, short_name
from train.data import DataError
from train.hardware import one_thread
from train.inference import TestSplit, score
from train.metrics import Scores
from train.page import data_uri, page_template
from train.runs import METRICS, RunError, read_log
from train.telemetry import watched_lines
from train.themes import THEMES

FOLDER = "anatomy"
FACTS = "anatomy.json"
PAGE = "report.html"


def study(
    folder: Path,
    against: Sequence[Path] = (),
    full: Path | None = None,
    text: str | None = None,
    matrix_only: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Writes FOLDER/anatomy/ with anatomy.json, the figures and report.html. Returns the page's path.

    against: other LoRA runs from the same start. full: a full fine-tuning run from the same start. text: the
    text whose decision is traced, by default a test article. matrix_only: compute only what needs no data,
    which is also done if the data cannot be loaded.

    Raises RunError if a run is not finished, has another method than needed or started from another base, if
    a report with scores would be replaced by one without, and what loading raises.
    """
    run = load_run(folder)
    others = [load_run(path) for path in against]
    full_run = None if full is None else load_run(full, "full")
    for flag, runs in (("--against", others), ("--full", [full_run] if full_run else [])):
        for other in runs:
            check_same_start(run, other, flag)
    test_set = None if matrix_only else _test_set(run, report)
    target = folder / FOLDER
    if test_set is None and _has_scores(target / FACTS):
        raise RunError(
            f"{target}: it holds a report with scores, which this analysis without data would replace; "
            "remove it first"
        )
    lines = read_log(folder / METRICS)

    report(f"decomposing {len(run.layers)} weights")
    with one_thread():
        facts = _without_data(run, others, full_run)
    facts["telemetry"] = _telemetry(run, lines)
    if test_set:
        facts |= _with_data(run, full_run, test_set, facts, text, report)

    report("drawing")
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):  # an earlier analysis may have drawn more figures
        old.unlink()
    write_atomically(target / FACTS, (json.dumps(facts, allow_nan=False) + "\n").encode())
    scores = Scores(np.asarray(run.summary["test_confusion_matrix"]))
    figures = draw_figures(facts, scores, lines, target)
    write_atomically(target / PAGE, render(facts, scores, figures, target).encode())
    return target / PAGE


def render(facts: dict[str, Any], scores: Scores, figures: dict[str, str], folder: Path) -> str:
    """The text of report.html: the template with facts and figures, images embedded, text escaped."""
    images = {
        name + suffix: data_uri((folder / f"{name}{suffix}.png").read_bytes())
        for name in figures
        for suffix in THEMES
    }
    template = page_template(
        "anatomy.html",
        short=short_name,
        targets=lambda targets: targets if isinstance(targets, str) else ", ".join(targets),
    )
    return template.render(
        **facts,
        report=scores.report(tuple(facts["run"]["labels"])),
        figures=figures,
        images=images,
        middle=middle_layers(facts["layers"]),
        wrong=int(scores.confusion.sum() - np.trace(scores.confusion)),
        tested=int(scores.confusion.sum()),
    )


def _has_scores(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["experiments"] is not None
    except (OSError, ValueError, LookupError, TypeError):  # there is no report, or it is damaged
        return False


def _test_set(run: Run, report: Report) -> TestSplit | None:
    try:
        return TestSplit.of(run.trained, run.recipe)
    except (DataError, DataPackageMissingError, RunError) as error:
        report(f"matrix parts only, because the data cannot be loaded: {first_line(error)}")
        return None


def _without_data(run: Run, others: list[Run], full: Run | None) -> dict[str, Any]:
    bases = decompose_bases(run)
    return {
        "run": _about(run),
        "layers": measure(run, bases),
        "constants": {"epsilon": EPSILON, "top": TOP},
        "runs": [_about(each) for each in (run, *others, *([full] if full else []))],
        "similarity": [
            {
                "name": other.name,
                "r": other.recipe.r,
                "seed": other.recipe.seed,
                "layers": compare_runs(run, other),
                "amplification": measure_amplification(other, bases),
            }
            for other in others
            if other.layers.keys() == run.layers.keys()
        ],
        "full": full and {"name": full.name, "layers": compare_full(run, full, bases), "truncated": None},
        "experiments": None,
        "mistakes": None,
        "trace": None,
    }


def _with_data(
    run: Run,
    full: Run | None,
    test_set: TestSplit,
    facts: dict[str, Any],
    text: str | None,
    report: Report,
) -> dict[str, Any]:
    model, labels = run.trained.model, run.trained.labels
    test_set.prepare(model)
    report(f"scoring on {len(test_set.rows):,} test texts, for analysis only")
    logits = test_set.logits(model)
    wrong = mistakes(test_set, logits, labels)
    chosen = text or test_set.split[wrong[0]["row"] if wrong else 0]["text"]
    found = {
        "mistakes": wrong,
        "trace": {
            **trace(model, test_set, chosen, labels),
            "source": "given" if text else "mistake" if wrong else "test",
        },
        "experiments": run_experiments(model, test_set, score(logits, test_set.rows.labels), report),
    }
    if full:
        report("scoring the full run's update, truncated")
        found["full"] = {**facts["full"], "truncated": truncate_full(run, full, test_set)}
    return found


def _about(run: Run) -> dict[str, Any]:
    keys = (
        "recipe", "model", "data", "method", "seed", "precision", "device", "labels", "test_accuracy",
        "test_macro_f1", "val_accuracy", "val_loss", "best_epoch", "epochs", "steps",
        "lora_parameters", "head_parameters", "trainable_parameters", "total_parameters", "adapter_bytes",
        "train_seconds",
    )  # fmt: skip
    missing = [key for key in keys if key not in run.summary]
    if missing:
        raise RunError(
            f"{run.folder}: its summary.json has no {missing[0]}; it was not written by this project"
        )
    recipe = run.recipe
    return {
        "name": run.name,
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "target_modules": recipe.target_modules,
        "learning_rate": recipe.learning_rate,
        **{key: run.summary[key] for key in keys},
    }


def _telemetry(run: Run, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first and the last logged step with telemetry; None if the run recorded none."""
    watched = watched_lines(lines)
    if not watched:
        return None
    layers = run.summary.get("adapted_layers") or list(run.layers)
    shown = ("delta_over_weight", "effective_rank", "gradient_norm_A", "gradient_norm_B")
    measured = [key for key in shown if key in watched[0]]  # A of LoRA-FA has no gradient
    for line in watched:
        for key in measured:
            if not (isinstance(line.get(key), list) and len(line[key]) == len(layers)):
                raise RunError(f"{run.folder / METRICS}: damaged: {key} is not one number for each layer")
    return {"layers": layers, "measured": measured, "first": watched[0], "last": watched[-1]}
