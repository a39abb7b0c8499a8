"""python -m train.compare: compares finished runs, as text and as one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lora.storage import write_atomically
from train.command import CommandParser, run_command
from train.comparison import Comparison, compare
from train.page import data_uri, page_template
from train.predictions import Prediction
from train.run_figures import draw_curves, save_curves
from train.runs import FIGURES, RunError
from train.tables import excerpt, markdown
from train.themes import draw_themes

FIGURE = "comparison.png"
_CHANGES = {"text": 10, "page": 200}  # how many changed predictions are shown
_CHARACTERS = {"text": 60, "page": 420}  # of each text


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.compare",
        "Compares finished runs: the settings that differ, test accuracy with 95% intervals, "
        "McNemar's paired test, cost, learning curves, and the test texts whose prediction changed.",
        epilog="Nothing is trained or evaluated: the numbers are those that the runs recorded.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write everything as one page")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE",
        help="the figure of the learning curves, .png, .svg or .pdf (default: in the page of --html, "
        f"otherwise {FIGURES}/{FIGURE} in the folder of the first run)",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _print_comparison(options.runs, options.html, options.figure))


def _print_comparison(folders: Sequence[Path], html: Path | None, figure: Path | None) -> None:
    _check_file("--html", html, (".html", ".htm"))
    _check_file("--figure", figure, (".png", ".svg", ".pdf"))
    comparison = compare(folders)
    print(_as_text(comparison))
    logs = [(run.name, run.log) for run in comparison.runs]
    if figure is None and html is None:
        figure = folders[0] / FIGURES / FIGURE
        figure.parent.mkdir(exist_ok=True)
    if figure is not None:
        save_curves(figure, logs)
        print(f"learning curves: {figure}")
    if html is not None:
        curves = draw_themes(lambda: draw_curves(logs))
        write_atomically(html, _as_page(comparison, curves).encode())
        print(f"page: {html}")


def _check_file(flag: str, path: Path | None, endings: tuple[str, ...]) -> None:
    """Raises RunError if no file of this kind can be written there."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise RunError(f"{flag} {path}: the name must end in {' or '.join(endings)}")
    if path.is_dir() or not path.parent.is_dir():
        what = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RunError(f"{flag} {path}: {what}")


def _as_text(comparison: Comparison) -> str:
    parts = []
    for table in comparison.tables:
        parts += [table.title, *([markdown(table.rows)] if table.rows else []), *table.notes, ""]
    parts += ["Changed predictions", _count(comparison, _CHANGES["text"]), *comparison.notes]
    if comparison.changes:
        rows = [["text", "true class", *(run.name for run in comparison.runs)]]
        for change in comparison.changes[: _CHANGES["text"]]:
            text = excerpt(change.text, _CHARACTERS["text"]) or change.digest or "-"
            rows.append([text, excerpt(change.label, 40), *map(_predicted, change.predictions)])
        parts.append(markdown(rows))
    return "\n".join(parts) + "\n"


def _as_page(comparison: Comparison, curves: dict[str, bytes]) -> str:
    limit = _CHANGES["page"]
    return page_template("compare.html", predicted=_predicted, excerpt=excerpt).render(
        names=[run.name for run in comparison.runs],
        tables=comparison.tables,
        curves={theme: data_uri(png) for theme, png in curves.items()},
        count=_count(comparison, limit),
        notes=comparison.notes,
        changes=comparison.changes[:limit],
        characters=_CHARACTERS["page"],
    )


def _count(comparison: Comparison, shown: int) -> str:
    count = len(comparison.changes)
    which = f"; these {shown} have the largest change" if count > shown else ""
    return f"Test texts with different predictions: {count:,}{which}."


def _predicted(row: Prediction | None) -> str:
    """A prediction with its probability, or - where the text was not tested."""
    if row is None:
        return "-"
    label = excerpt(row.prediction, 40)
    return f"{label} {row.probabilities[row.prediction]:.2f}" if row.probabilities else label


if __name__ == "__main__":
    sys.exit(main())
