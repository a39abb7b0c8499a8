"""python -m train.anatomy: what a run's adapter learnt, as numbers, figures and one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora import AdapterError
from model import ModelError
from model.minilm import DataPackageMissingError
from train.anatomy.report import study
from train.config import RecipeError
from train.data import DataError
from train.runs import SUMMARY, RunError

RUNS = Path("runs")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.anatomy",
        description="Takes a trained LoRA run apart and explains it: RUN/anatomy/report.html.",
        epilog="The test split is read for analysis only.",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="a finished LoRA run (default: the newest in runs/)"
    )
    parser.add_argument(
        "--against", type=Path, nargs="+", action="extend", default=[], metavar="RUN2",
        help="LoRA runs of other ranks, seeds or targets on the same model and data",
    )  # fmt: skip
    parser.add_argument("--full", type=Path, metavar="FULL_RUN", help="a full fine-tuning run beside it")
    parser.add_argument("--text", help="the text whose decision is traced (default: a test article)")
    parser.add_argument(
        "--matrix-only", action="store_true", help="what needs no data: no scores, no trace; seconds"
    )
    options = parser.parse_args(arguments)
    if options.text is not None and options.matrix_only:
        return _fail("--text is traced through the data's model run, which --matrix-only leaves out")
    if options.text is not None and not options.text.strip():
        return _fail("--text is empty, and an empty text has no topic")
    try:
        page = study(
            options.run or _newest(RUNS), options.against, options.full, options.text, options.matrix_only,
            lambda words: print(words, file=sys.stderr),
        )  # fmt: skip
    except KeyboardInterrupt:
        return 130
    except (
        AdapterError, DataError, DataPackageMissingError, ModelError, RecipeError, RunError, OSError,
    ) as error:  # fmt: skip
        return _fail(str(error))
    print(f"{page}: open it in a browser; the numbers are in {page.with_name('anatomy.json')}")
    return 0


def _newest(runs: Path) -> Path:
    """The LoRA run that finished last. Raises RunError if there is none."""
    finished = [path.parent for path in runs.glob(f"*/{SUMMARY}") if (path.parent / "adapter").is_dir()]
    if not finished:
        raise RunError(f"{runs}: no finished LoRA run in it; `make train` makes one")
    return max(finished, key=lambda folder: (folder / SUMMARY).stat().st_mtime)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
