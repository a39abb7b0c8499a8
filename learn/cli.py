"""The command `python -m learn`, which `make learn` runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from learn.course import BONUS, LAST, WORK, create_files, file_name, page, reset, shown, solution
from learn.runner import run
from train.command import run_command


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 all is done, 1 a step is not done, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m learn",
        description="Checks your files in learn/work. Start with learn/README.md.",
    )
    parser.add_argument("--step", type=int, metavar="N", help=f"check step N alone; {BONUS} is the bonus")
    parser.add_argument("--watch", action="store_true", help="check again whenever a file is saved")
    parser.add_argument("--reset", type=int, metavar="N", help="start step N again; your file is kept")
    parser.add_argument("--solution", type=int, metavar="N", help="show our solution of step N, after asking")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options, WORK))


def _run(options: argparse.Namespace, folder: Path) -> int:
    for step in (options.step, options.reset, options.solution):
        if step is not None:
            page(step)  # raises CourseError if there is none
    for path in create_files(folder):
        if path.name == file_name(1):
            print(f"Created your files in {shown(folder)}. Start with {shown(page(1))}.\n")
    if options.reset is not None:
        kept = reset(folder, options.reset)
        where = f"; your file is kept as {shown(kept)}" if kept else ""
        print(f"{shown(folder / file_name(options.reset))} is new{where}")
        return 0
    if options.solution is not None:
        return _show_solution(options.solution)
    steps = range(1, LAST + 1) if options.step is None else [options.step]
    if options.watch:
        return _watch(folder, steps)
    return 0 if run(folder, steps) else 1


def _show_solution(step: int) -> int:
    print(f"Show our solution of step {step}? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        print("not shown")
        return 0
    print(solution(step))
    return 0


def _watch(folder: Path, steps: range | list[int]) -> int:
    """Runs the checks after every change of a file, until Ctrl-C."""
    seen = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = {path: path.stat().st_mtime_ns for path in folder.glob("step*.py")}
            if now != seen:
                seen = now
                print("\n" + "-" * 72)
                run(folder, steps)
                print("\nWaiting for a file to be saved; Ctrl-C stops.", flush=True)
            time.sleep(0.3)
    return 0
