"""The whole anatomy of a run: what is computed in which order, and the files that are left."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lora.files import write_atomically
from model.minilm import DataPackageMissingError
from train.anatomy.draw import THEMES, draw_figures
from train.anatomy.experiments import Exam, Say, mistakes, run_experiments, score, trace, truncate_full
from train.anatomy.measure import (
    EPSILON,
    TOP,
    compare_full,
    compare_runs,
    decompose_bases,
    measure,
    measure_amplification,
)
from train.anatomy.subject import Subject, check_same_start, load_subject, middle_layers, short_name
from train.data import DataError
from train.hardware import one_thread
from train.job import METRICS
from train.metrics import Scores
from train.runs import RunError
from train.telemetry import watched_lines

FOLDER = "anatomy"
FACTS = "anatomy.json"
PAGE = "report.html"
_TEMPLATES = Path(__file__).parent.parent / "templates"


def study(
    folder: Path,
    against: Sequence[Path] = (),
    full: Path | None = None,
    text: str | None = None,
    matrix_only: bool = False,
    say: Say = lambda words: None,
) -> Path:
    """Writes FOLDER/anatomy/: anatomy.json, the figures and report.html, whose path it returns.

    against: other LoRA runs from the same start; full: a full fine-tuning run from it. text: whose decision
    is traced, instead of a test article's. Without the data there are the matrix parts alone, as with
    matrix_only.

    Raises RunError if runs are not finished, not of their kind or not from the same start, and what loading
    raises.
    """
    subject = load_subject(folder)
    others = [load_subject(path) for path in against]
    full_run = None if full is None else load_subject(full, "full")
    for flag, runs in (("--against", others), ("--full", [full_run] if full_run else [])):
        for run in runs:
            check_same_start(subject, run, flag)
    exam = None if matrix_only else _exam(subject, say)
    lines = _read_lines(folder / METRICS)

    say(f"decomposing {len(subject.layers)} weights")
    with one_thread():
        facts = _without_the_data(subject, others, full_run)
    facts["telemetry"] = _telemetry(subject, lines)
    if exam:
        facts |= _with_the_data(subject, full_run, exam, facts, text, say)

    say("drawing")
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):  # of an earlier study that had more to draw
        old.unlink()
    write_atomically(target / FACTS, (json.dumps(facts, allow_nan=False) + "\n").encode())
    scores = Scores(np.asarray(subject.summary["test_confusion_matrix"]))
    figures = draw_figures(facts, scores, lines, target)
    write_atomically(target / PAGE, render(facts, scores, figures, target).encode())
    return target / PAGE


def render(facts: dict[str, Any], scores: Scores, figures: dict[str, str], folder: Path) -> str:
    """report.html: facts and figures in the template, every image inside the page, every text escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short_name
    environment.filters["targets"] = lambda targets: (
        targets if isinstance(targets, str) else ", ".join(targets)
    )
    images = {
        name + suffix: "data:image/png;base64,"
        + base64.b64encode((folder / f"{name}{suffix}.png").read_bytes()).decode()
        for name in figures
        for suffix in THEMES
    }  # fmt: skip
    return environment.get_template("anatomy.html").render(
        **facts,
        report=scores.report(tuple(facts["run"]["labels"])),
        figures=figures,
        images=images,
        middle=middle_layers(facts["layers"]),
        wrong=int(scores.confusion.sum() - np.trace(scores.confusion)),
        tested=int(scores.confusion.sum()),
    )


def _exam(subject: Subject, say: Say) -> Exam | None:
    try:
        return Exam.of(subject)
    except (DataError, DataPackageMissingError, RunError) as error:
        say(f"matrix parts only, for the data cannot be had: {str(error).splitlines()[0]}")
        return None


def _without_the_data(subject: Subject, others: list[Subject], full: Subject | None) -> dict[str, Any]:
    bases = decompose_bases(subject)
    return {
        "run": _about(subject),
        "layers": measure(subject, bases),
        "constants": {"epsilon": EPSILON, "top": TOP},
        "runs": [_about(run) for run in (subject, *others, *([full] if full else []))],
        "similarity": [
            {
                "name": other.name,
                "r": other.recipe.r,
                "seed": other.recipe.seed,
                "layers": compare_runs(subject, other),
                "amplification": measure_amplification(other, bases),
            }
            for other in others
            if other.layers.keys() == subject.layers.keys()
        ],
        "full": full and {"name": full.name, "layers": compare_full(subject, full, bases), "truncated": None},
        "experiments": None,
        "mistakes": None,
        "trace": None,
    }


def _with_the_data(
    subject: Subject, full: Subject | None, exam: Exam, facts: dict[str, Any], text: str | None, say: Say
) -> dict[str, Any]:
    model, labels = subject.trained.model, subject.trained.labels
    exam.prepare(model)
    say(f"scoring on {len(exam.rows):,} test articles, for analysis only")
    logits = exam.logits(model)
    wrong = mistakes(exam, logits, labels)
    chosen = text or exam.split[wrong[0]["row"] if wrong else 0]["text"]
    found = {
        "mistakes": wrong,
        "trace": {
            **trace(model, exam, chosen, labels),
            "source": "given" if text else "mistake" if wrong else "test",
        },
        "experiments": run_experiments(model, exam, score(logits, exam.rows.labels), say),
    }
    if full:
        say("scoring the full run's update, truncated")
        found["full"] = {**facts["full"], "truncated": truncate_full(subject, full, exam)}
    return found


def _about(run: Subject) -> dict[str, Any]:
    keys = (
        "recipe", "model", "data", "method", "seed", "precision", "device", "labels", "test_accuracy",
        "test_macro_f1", "val_accuracy", "val_loss", "best_epoch", "epochs", "steps", "history",
        "lora_parameters", "head_parameters", "trainable_parameters", "total_parameters", "adapter_bytes",
        "train_seconds",
    )  # fmt: skip
    missing = [key for key in keys if key not in run.summary]
    if missing:
        raise RunError(f"{run.folder}: its summary.json has no {missing[0]}; it is not one of this project")
    recipe = run.recipe
    return {
        "name": run.name,
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "target_modules": recipe.target_modules,
        "learning_rate": recipe.learning_rate,
        **{key: run.summary[key] for key in keys},
    }


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged: {error}") from error


def _telemetry(subject: Subject, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first logged step, where the textbook facts are; None if the run kept no telemetry."""
    watched = watched_lines(lines)
    if not watched:
        return None
    layers = subject.summary.get("adapted_layers") or list(subject.layers)
    return {"layers": layers, "first": watched[0], "last": watched[-1]}
