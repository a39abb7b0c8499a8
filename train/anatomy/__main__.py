"""python -m train.anatomy: analyses what a run's adapter learned, as numbers, figures and one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.anatomy.study import study
from train.command import CommandParser, print_error, run_command
from train.runs import RUNS, newest_run


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.anatomy",
        "Analyses a trained LoRA run and writes RUN/anatomy/report.html.",
        "The test split is read for analysis only.",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="a finished LoRA run (default: the newest in runs/)"
    )
    parser.add_argument(
        "--against", type=Path, nargs="+", action="extend", default=[], metavar="RUN2",
        help="LoRA runs with other ranks, seeds or targets on the same model and data",
    )  # fmt: skip
    parser.add_argument(
        "--full", type=Path, metavar="FULL_RUN", help="a full fine-tuning run to compare with"
    )
    parser.add_argument("--text", help="the text whose decision is traced (default: a test text)")
    parser.add_argument(
        "--matrix-only", action="store_true", help="only what needs no data: no scores, no trace; seconds"
    )
    options = parser.parse_args(arguments)
    if options.text is not None and options.matrix_only:
        return print_error("--text cannot be traced with --matrix-only, which does not run the model")
    if options.text is not None and not options.text.strip():
        return print_error("--text must not be empty")
    return run_command(lambda: _study(options))


def _study(options: argparse.Namespace) -> None:
    page = study(
        options.run or newest_run(RUNS), options.against, options.full, options.text, options.matrix_only,
        lambda message: print(message, file=sys.stderr),
    )  # fmt: skip
    print(f"{page}: open it in a browser; the numbers are in {page.with_name('anatomy.json')}")


if __name__ == "__main__":
    sys.exit(main())
