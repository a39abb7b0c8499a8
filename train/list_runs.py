"""python -m train.runs: a table of the runs in a folder."""

from __future__ import annotations

from pathlib import Path

from train.command import CommandParser, run_command
from train.runs import CONFIG, SUMMARY, RunError, read_summary, run_recipe
from train.tables import duration, excerpt, markdown

_HEADER = ["run", "method", "model", "data", "r", "targets", "test accuracy", "validation accuracy",
           "trained parameters", "time", "state"]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.runs",
        "Lists the runs in FOLDER. Settings come from config.toml, results from summary.json.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _print_runs(options.folder))


def _print_runs(folder: Path) -> None:
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder; `make train` makes a run in runs/")
    runs = [
        path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file() or (path / SUMMARY).is_file()
    ]
    if not runs:
        itself = "; it is a run itself: give the folder that contains it"
        raise RunError(f"{folder}: it contains no run{itself if (folder / CONFIG).is_file() else ''}")
    rows, damage = [_HEADER], []
    for run in runs:
        try:
            rows.append(_row(run))
        except (RunError, OSError) as error:
            rows.append([excerpt(run.name, 60), *["-"] * (len(_HEADER) - 2), "damaged"])
            damage.append(str(error))
    print("\n".join([markdown(rows), *damage]))


def _row(folder: Path) -> list[str]:
    """Raises RunError, OSError."""
    recipe = run_recipe(folder)
    targets = (
        recipe.target_modules if isinstance(recipe.target_modules, str) else ", ".join(recipe.target_modules)
    )
    adapter = [str(recipe.r), targets] if recipe.method == "lora" else ["-", "-"]
    if (folder / SUMMARY).is_file():
        summary = read_summary(folder)
        results = [
            f"{summary['test_accuracy']:.4f}", f"{summary['val_accuracy']:.4f}",
            f"{summary['trainable_parameters']:,}", duration(summary["train_seconds"]), "finished",
        ]  # fmt: skip
    else:
        results = [*["-"] * 4, "unfinished"]
    names = [folder.name, recipe.method, recipe.model, recipe.data, *adapter]
    return [*(excerpt(name, 60) for name in names), *results]
