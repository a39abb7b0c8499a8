"""A run's folder: the names of its files, which folders can be used, and what is recorded in one.

adapter/               the adapter in PEFT's format (method = lora)
weights.safetensors    the trained weights (method = full or head)
config.toml            the recipe
metrics.jsonl          one line per logged step and epoch
checkpoint/            the last two checkpoints; of a finished run, the last one
test_predictions.csv   class, prediction, digest and probabilities of each test text (predictions.py)
figures/               learning curves, confusion matrix, classification report
summary.json           the results; its presence marks a finished run (only the figures follow it)
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.errors import UserError
from lora.storage import write_atomically
from train.command import shell_command
from train.config import Recipe, parse_recipe

RUNS = Path("runs")  # where runs are written by default
ADAPTER = "adapter"
WEIGHTS = "weights.safetensors"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint"
PREDICTIONS = "test_predictions.csv"
FIGURES = "figures"
SUMMARY = "summary.json"
_NUMBER = int | float
_SUMMARY_KINDS: dict[str, Any] = {
    **dict.fromkeys(("recipe", "method"), str),
    **dict.fromkeys(("labels", "test_confusion_matrix", "test_report"), list),
    **dict.fromkeys(("test_accuracy", "test_macro_f1", "val_accuracy"), _NUMBER),
    **dict.fromkeys(("best_epoch", "epochs", "lora_parameters", "trainable_parameters"), int),
    **dict.fromkeys(("total_parameters", "adapter_bytes", "peak_memory_bytes"), int),
    **dict.fromkeys(("train_seconds", "examples_per_second", "padding_fraction"), _NUMBER),
}  # what the text at the end of a run needs
_REPORT_KINDS: dict[str, Any] = {"label": str, "f1": _NUMBER}  # a row of test_report
_LOCK = ".lock"
_NAME = "# recipe: "  # the first line of config.toml


class RunError(UserError, RuntimeError):
    """A run's folder that cannot be used. The message says what is wrong and what to do."""


def run_recipe(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. Raises RunError."""
    try:
        return parse_recipe((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: not a run (there is no {CONFIG})") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the finished run in `folder`. Raises RunError."""
    check_finished(folder)
    try:
        text = (folder / SUMMARY).read_text(encoding="utf-8")
        summary: dict[str, Any] = json.loads(text, parse_constant=_refuse_constant)
        _check_kinds(summary, _SUMMARY_KINDS)
        for row in summary["test_report"]:
            _check_kinds(row, _REPORT_KINDS)
        confusion = summary["test_confusion_matrix"]
        if not (sum(map(sum, confusion)) and len(summary["labels"]) == len(confusion)):
            raise ValueError("its scores are not those of its labels")
        if summary["labels"] != [row["label"] for row in summary["test_report"]]:
            raise ValueError("its report is not that of its labels")
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{folder / SUMMARY}: damaged: {error}; remove it, and `{resume_command(folder)}` writes it again"
        ) from error
    return summary


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _check_kinds(found: Any, kinds: dict[str, Any]) -> None:
    for key, kind in kinds.items():
        if not (isinstance(found, dict) and isinstance(found.get(key), kind)):
            raise ValueError(f"{key} is missing or of another type")


def check_finished(folder: Path) -> None:
    """Raises RunError if there is no such folder, or if the run in it is not finished."""
    if not folder.is_dir():
        raise RunError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    if (folder / CONFIG).is_file() and not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: the run is not finished; `{resume_command(folder)}` continues it")


def newest_run(runs: Path) -> Path:
    """The LoRA run in `runs` that finished last. Raises RunError if there is none."""
    finished = [path.parent for path in runs.glob(f"*/{SUMMARY}") if (path.parent / ADAPTER).is_dir()]
    if not finished:
        command = shell_command("train", "--output", runs / "quickstart")
        raise RunError(f"{runs}: it holds no finished LoRA run; `{command}` makes one")
    return max(finished, key=lambda folder: (folder / SUMMARY).stat().st_mtime)


def resume_command(folder: Path) -> str:
    """The command that continues the run in `folder`."""
    return shell_command("train", "--resume", "--output", folder)


def recipe_name(folder: Path) -> str:
    """The name of the recipe that the run in `folder` was started with, or "config" if it is not recorded."""
    first = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix(_NAME) if first.startswith(_NAME) else Path(CONFIG).stem


def prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Checks that `recipe` can be run or resumed in `folder`. Returns whether the run is finished already.

    recipe: with absolute paths. Raises RunError.
    """
    refuse_file(folder)
    # Names with a leading dot are the lock, and temporary files of a write that was killed.
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if not resume:
        if names:
            found = (
                "a finished run" if SUMMARY in names else "an unfinished run" if CONFIG in names else "files"
            )
            raise RunError(
                f"{folder}: it holds {found} already; --resume continues a run, --output DIR starts another"
            )
        return False
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder, so there is no run to resume; omit --resume to start one")
    if names and CONFIG not in names:
        raise RunError(f"{folder}: it holds files but no {CONFIG}, so there is no run to resume")
    # Runs of earlier versions recorded relative paths.
    if names and (recorded := run_recipe(folder).with_absolute_paths()) != recipe:
        before, now = dataclasses.asdict(recorded), dataclasses.asdict(recipe)
        changed = [
            f"{key} = {before[key]!r} there, {key} = {now[key]!r} now"
            for key in now
            if before[key] != now[key]
        ]
        raise RunError(f"{folder}: cannot resume with another recipe: {'; '.join(changed)}")
    return SUMMARY in names


def refuse_file(folder: Path) -> None:
    """Raises RunError if `folder` or a folder around it is a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise RunError(f"{folder}: {'' if path == folder else f'{path} is '}not a folder")


def refuse_used(folder: Path) -> None:
    """Raises RunError unless `folder` is new or empty."""
    refuse_file(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder}: not an empty folder")


def write_recipe(folder: Path, name: str, recipe: Recipe) -> None:
    """Writes config.toml."""
    write_atomically(folder / CONFIG, f"{_NAME}{name}\n{recipe.to_toml()}".encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates `folder` and locks it against other runs. The lock ends with the process, however it ends.

    Raises RunError if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another run is writing to it at this moment") from None
        yield


def log_digest(path: Path, lines: int) -> str:
    """The SHA-256 of the first `lines` lines of a log, whether or not the last one has its newline."""
    found = path.read_bytes().splitlines()[:lines] if path.is_file() else []
    return hashlib.sha256(b"\n".join([str(len(found)).encode(), *found])).hexdigest()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. Raises RunError."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged: {error}") from error
    return lines


if __name__ == "__main__":
    # A module of its own imports this one under its name, so that RunError is one class.
    from train.list_runs import main

    sys.exit(main())
